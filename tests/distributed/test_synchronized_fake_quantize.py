"""Clip, sign, collectives and errors of a quantizer whose tensor is split over several ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from octav_hf.functional import octav_clip, register_clip_rule, round_to_grid
from octav_hf.functional.registry import CLIP_RULES, RULES_OF_TABLES, poolable_rules
from octav_hf.nn import FakeQuantize, SynchronizedFakeQuantize

from .. import twins
from .conftest import Run
from .scenarios import tensors

Tensor = torch.Tensor

REDUCE, GATHER = "allreduce_", "allgather_"

SETTINGS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "octav": ({}, [REDUCE]),
    "octav, sign from the data": ({"signed": None}, [REDUCE]),
    "octav, unsigned": ({"signed": False}, [REDUCE]),
    "octav, asymmetric": ({"signed": None, "asymmetric": True}, [REDUCE] * 2),
    "octav, two updates": ({"signed": None, "clip_options": {"max_iterations": 2}}, [REDUCE]),
    "mse": ({"signed": None, "clip": "mse"}, [REDUCE]),
    "percentile": ({"clip": "percentile", "clip_options": {"percentile": 99.0}}, [REDUCE]),
    "max": ({"signed": None, "clip": "max"}, [GATHER]),
    "max, asymmetric": ({"signed": None, "clip": "max", "asymmetric": True}, [GATHER] * 2),
}
"""Name -> settings of the quantizer, and the collectives of a clip."""


def check_clip(x: Tensor, clip: float, signed: bool, settings: dict[str, Any], where: str) -> None:
    """Compare with a reference in float64 that knows the whole tensor."""
    rule, options = settings.get("clip", "octav"), settings.get("clip_options", {})
    if rule == "max":
        assert clip == pytest.approx(twins.max_clip_twin(x, signed), rel=1e-7), where
    elif rule == "percentile":  # to within its bin
        assert clip == pytest.approx(twins.percentile_clip_twin(x, **options, signed=signed), rel=2**-7), where
    elif rule == "octav" and (options or len(set(x.flatten().tolist())) < 10):
        assert clip == pytest.approx(twins.octav_clip_twin(x, 4, signed, **options), rel=5e-3), where
    elif not twins.octav_magnitudes(x, signed).size:
        assert clip == 0, where
    elif rule == "octav":
        assert clip == pytest.approx(twins.octav_root_twin(x, 4, signed), rel=2e-4), where
    else:
        error = 1.02 * twins.best_sweep_mse(x, 4, signed) + 1e-5 * float(x.double().square().mean())
        assert twins.mse_twin(x, clip, 4, signed) <= error, where


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_it_is_that_of_the_whole_tensor_by_one_collective(succeed: Run, name: str) -> None:
    """Bit for bit the same for 1, 2 and 4 ranks, also if one rank has no values."""
    settings, collectives = SETTINGS[name]
    (alone,) = succeed("quantize", 1, nothing_on=-1, grad_mode="enable_grad", **settings)
    splits = [(2, -1, "enable_grad"), (2, 0, "inference_mode"), (4, 2, "no_grad")]
    for ranks, nothing_on, grad_mode in splits:
        outcomes = succeed("quantize", ranks, nothing_on=nothing_on, grad_mode=grad_mode, **settings)
        for case in tensors():
            for rank in outcomes:
                assert rank[case]["messages"] == collectives, case
                assert {**rank[case], "output": 0, "messages": 0} == {**alone[case], "output": 0, "messages": 0}, case
            assert torch.equal(torch.cat([rank[case]["output"] for rank in outcomes]), alone[case]["output"]), case
    for case, x in tensors().items():
        found = alone[case]
        assert found["messages"] == []
        assert (found["clip"].shape, found["clip"].dtype) == ((), torch.promote_types(x.dtype, torch.float32)), case
        low = float(x.min()) if x.numel() else 0.0
        if found["offset"] < 0:
            assert settings.get("asymmetric")
            assert (found["signed"], found["offset"]) == (False, low), case
        elif settings.get("signed", True) is None:
            assert found["signed"] is (low < 0), case
        else:
            assert found["signed"] is settings.get("signed", True), case
        above = x.double() - found["offset"]
        check_clip(above, float(found["clip"]), found["signed"], settings, f"{name}: {case}")
        output = round_to_grid(above.to(found["clip"].dtype), found["clip"], 4, signed=found["signed"])
        assert torch.equal(found["output"], (output + found["offset"]).to(x.dtype)), case
    if settings.get("asymmetric"):
        assert alone["long"]["offset"] < 0


PARTS: dict[str, tuple[dict[str, Any], list[int]]] = {
    "channel or token": ({"dim": [-1]}, [8, 3, 5]),
    "head": ({"dim": [-2, -1]}, [8, 2, 3, 5]),
    "token of a layer's input": ({"dim": [-1]}, [8, 5]),
    "group": ({"dim": [-1], "group_size": 2}, [8, 5]),
}


@pytest.mark.slow
@pytest.mark.parametrize("clip", ["octav", "mse", "max", "percentile"])
@pytest.mark.parametrize(("settings", "shape"), PARTS.values(), ids=PARTS.keys())
def test_of_parts_one_collective_shares_sign_and_offset(
    succeed: Run, settings: dict[str, Any], shape: list[int], clip: str
) -> None:
    for more, collectives in (
        ({"signed": True}, []),
        ({"signed": False}, []),
        ({"signed": None}, [GATHER]),
        ({"signed": None, "asymmetric": True}, [GATHER]),
    ):
        keywords = settings | more | {"clip": clip}
        (alone,) = succeed("quantize_parts", 1, shape=shape, **keywords)
        outcomes = zip(*succeed("quantize_parts", 2, shape=shape, **keywords), strict=True)
        for lowest, whole, ranks in zip((0.0, -0.5, -9.0), alone, outcomes, strict=True):
            for rank in ranks:
                assert rank["messages"] == collectives
                assert (rank["signed"], rank["offset"]) == (whole["signed"], whole["offset"])
            assert whole["messages"] == []
            assert torch.equal(torch.cat([rank["clip"] for rank in ranks]), whole["clip"])
            assert torch.equal(torch.cat([rank["output"] for rank in ranks]), whole["output"])
            assert whole["signed"] is (lowest < 0 and not whole["offset"] if more["signed"] is None else more["signed"])
            if more.get("asymmetric") and clip == "max":  # a mean below 9 on the signed grid, and above 0.5
                assert whole["offset"] == (lowest if lowest > -1 else 0.0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "settings"),
    [
        (2, {}),
        (4, {"clip": "mse", "signed": None}),
        (2, {"clip": "percentile", "signed": None, "asymmetric": True}),
        (4, {"clip": "max"}),
        (2, {"clip": "max", "signed": None, "asymmetric": True}),
        (4, {"signed": None, "dim": [-1]}),
        (2, {"clip": "mse", "signed": None, "asymmetric": True, "dim": [-1]}),
    ],
    ids=str,
)
def test_what_is_not_finite_on_one_rank_is_an_error_on_all(succeed: Run, ranks: int, settings: dict[str, Any]) -> None:
    values = [float("nan"), float("inf"), float("-inf")]
    for rank, errors in enumerate(succeed("quantize_what_is_not_finite", ranks, values=values, **settings)):
        assert len(errors) == len(values)
        for error, what in zip(errors, ("1 NaN and 0 Inf", "0 NaN and 1 Inf", "0 NaN and 1 Inf"), strict=True):
            assert error.startswith(f"layer input: {settings.get('clip', 'octav')}_clip: ")
            assert ("x of shape (4, 2)" in error and what in error) is (rank == 1)
            assert ("the part of x on rank 1 holds NaN or Inf" in error) is (rank != 1)


@pytest.mark.slow
def test_values_beyond_float32_are_an_error_that_says_so(succeed: Run) -> None:
    (first,), (second,) = succeed("quantize_what_is_not_finite", 2, values=[1e300])
    assert "the part of x on rank 1 holds NaN or Inf" in first
    assert "x of shape (4, 2) holds values beyond the range of float32" in second


def test_a_rank_without_values_is_measured_in_step(succeed: Run) -> None:
    first, second = succeed("measure", 2)
    assert first == {"weight": 64, "input": 32}
    assert second == {"weight": 64, "input": 0}


def test_a_long_tensor_has_the_clip_of_one_that_is_not_synchronized() -> None:
    x = torch.randn(1 << 15, generator=torch.Generator().manual_seed(0))
    for clip in poolable_rules():
        grids = [quantizer(4, clip=clip).dynamic_grid(x) for quantizer in (FakeQuantize, SynchronizedFakeQuantize)]
        assert torch.equal(grids[0].clip, grids[1].clip), clip


def test_it_shares_no_result_with_one_that_is_not_synchronized() -> None:
    assert SynchronizedFakeQuantize(4).cache_key == SynchronizedFakeQuantize(4).cache_key
    assert SynchronizedFakeQuantize(4).cache_key != FakeQuantize(4).cache_key


def test_a_rule_of_the_users_own_is_one_for_all_ranks_if_it_reads_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    for registered in (CLIP_RULES, RULES_OF_TABLES):  # put back at the end
        for name in ("halves", "own"):
            monkeypatch.setitem(registered, name, None)
            registered.pop(name)
    assert poolable_rules() == ["max", "mse", "octav", "percentile"]
    of_table = RULES_OF_TABLES["octav"]
    register_clip_rule("own")(octav_clip)
    register_clip_rule("halves", of_table=lambda *args: of_table(*args) / 2)(
        lambda *args, **kw: octav_clip(*args, **kw) / 2
    )
    assert poolable_rules() == ["halves", "max", "mse", "octav", "percentile"]
    x = torch.randn(100, generator=torch.Generator().manual_seed(0))
    clips = [SynchronizedFakeQuantize(4, clip=clip).compute_clip(x) for clip in ("octav", "halves")]
    assert torch.equal(clips[0] / 2, clips[1])


@pytest.mark.slow
def test_collectives_are_compiled_in_one_graph(succeed: Run) -> None:
    for rank in succeed("quantize_compiled", 2):
        for name, (output, expected) in rank.items():
            assert torch.equal(output, expected), name
