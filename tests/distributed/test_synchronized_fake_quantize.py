"""The clip, the sign and the errors of a quantizer whose tensor is spread over several ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from octav_hf.functional import max_clip, mse_clip, octav_clip, round_to_grid
from octav_hf.functional.registry import rules_for_all_ranks
from octav_hf.nn import FakeQuantize, SynchronizedFakeQuantize

from ..twins import max_clip_twin, octav_clip_twin
from .conftest import Run
from .scenarios import tensors

pytestmark = pytest.mark.slow


def clip_twin(x: torch.Tensor, signed: bool, clip: str = "octav", clip_options: dict[str, Any] | None = None) -> float:
    return octav_clip_twin(x, 4, signed, **(clip_options or {})) if clip == "octav" else max_clip_twin(x, signed)


@pytest.mark.parametrize(
    ("ranks", "nothing_on", "grad_mode", "settings"),
    [
        (2, -1, "enable_grad", {}),
        (4, 2, "no_grad", {}),
        (2, 0, "inference_mode", {"signed": None}),
        (4, -1, "enable_grad", {"signed": None, "clip_options": {"max_iterations": 2}}),
        (2, -1, "enable_grad", {"signed": False}),
        (4, 0, "enable_grad", {"signed": None, "clip": "max"}),
    ],
    ids=str,
)
def test_it_is_that_of_the_whole_tensor(
    succeed: Run, ranks: int, nothing_on: int, grad_mode: str, settings: dict[str, Any]
) -> None:
    outcomes = succeed("quantize", ranks, nothing_on=nothing_on, grad_mode=grad_mode, **settings)
    how = {name: value for name, value in settings.items() if name != "signed"}
    for name, x in tensors().items():
        of_ranks = [outcome[name] for outcome in outcomes]
        signed = bool((x < 0).any()) if settings.get("signed", True) is None else settings.get("signed", True)
        assert {rank["signed"] for rank in of_ranks} == {signed}, name
        first = of_ranks[0]["clip"]
        assert all(torch.equal(rank["clip"], first) for rank in of_ranks), name
        assert (first.shape, first.dtype) == ((), torch.promote_types(x.dtype, torch.float32))
        # A clip among subnormal numbers can be no better than they are.
        assert float(first) == pytest.approx(clip_twin(x, signed, **how), rel=1e-6, abs=1e-43), name
        output = torch.cat([rank["output"] for rank in of_ranks])
        assert torch.equal(output, round_to_grid(x, first, 4, signed=signed).to(x.dtype)), name
        assert len({rank["messages"] for rank in of_ranks}) == 1, name
    if how.get("clip") == "max":
        assert {outcome["messages"] for outcome in outcomes[0].values()} == {1}
    if "clip_options" not in how and "clip" not in how:
        assert outcomes[0]["normal"]["messages"] <= 7


@pytest.mark.parametrize("signed", [True, False, None])
def test_clips_of_parts_are_of_no_other_rank(succeed: Run, signed: bool | None) -> None:
    """Only the sign is, where it goes by the values."""
    x = torch.rand(8, 3, 5, generator=torch.Generator().manual_seed(0))
    for lowest, outcomes in zip(
        (0.0, -0.5), zip(*succeed("quantize_parts", 2, signed=signed), strict=True), strict=True
    ):
        x[-1, -1, -1] = lowest
        sign = lowest < 0 if signed is None else signed
        expected = torch.tensor([[clip_twin(row, sign) for row in rows] for rows in x])[..., None]
        assert {rank["signed"] for rank in outcomes} == {sign}
        torch.testing.assert_close(torch.cat([rank["clip"] for rank in outcomes]), expected, rtol=1e-5, atol=0)
        output = torch.cat([rank["output"] for rank in outcomes])
        torch.testing.assert_close(output, round_to_grid(x, expected, 4, signed=sign), rtol=1e-4, atol=1e-6)
        assert [rank["messages"] for rank in outcomes] == [int(signed is None)] * 2


@pytest.mark.parametrize("clip", ["octav", "max", "mse"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("ranks", [2, 4])
def test_what_is_not_finite_on_one_rank_is_an_error_on_all(succeed: Run, ranks: int, value: float, clip: str) -> None:
    messages = succeed("quantize_what_is_not_finite", ranks, value=value, clip=clip)
    for rank, (message, later) in enumerate(messages):
        assert message.startswith(f"layer input: {clip}_clip: ")
        wanted = r"x of shape (4,)" if rank == 1 else "the part of x on rank 1 holds NaN or Inf"
        assert wanted in message
        # A clip of 1 has no level at 1, one of 2 has.
        assert later == ("2.0" if clip == "mse" else "1.0")


def test_it_shares_no_result_with_one_that_is_not_synchronized() -> None:
    assert SynchronizedFakeQuantize(4).cache_key == SynchronizedFakeQuantize(4).cache_key
    assert SynchronizedFakeQuantize(4).cache_key != FakeQuantize(4).cache_key


def test_rules_for_all_ranks() -> None:
    assert rules_for_all_ranks() == ["max", "mse", "octav"]


@pytest.mark.parametrize("rule", [octav_clip, max_clip, mse_clip])
def test_clips_of_rows_are_refused(rule: Any) -> None:
    with pytest.raises(ValueError, match="with ranks there is one clip for the whole tensor; pass dim=None, not 1"):
        rule(torch.ones(2, 3), 4, dim=1, ranks=object())
