"""Data-parallel training with ``sync_activation_clips`` equals training of one process on the whole batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from octav_hf import OctavConfig, apply_octav

from .conftest import Run
from .scenarios import batch, bert

pytestmark = pytest.mark.slow

Tensors = dict[str, torch.Tensor]

SYNCHRONIZED = {"sync_activation_clips": True}
TOKENS = {**dict.fromkeys(("input", "query", "key", "probabilities"), "token"), "value": "channel"}
HEADS = {**dict.fromkeys(("query", "probabilities"), "attn_head"), "key": "token", "value": "channel"}


def largest_error(gradients: Tensors, expected: Tensors) -> float:
    """Over the largest gradient of each parameter, or a hundredth of the model's where that is nearly zero."""
    assert gradients.keys() == expected.keys()
    smallest = max(float(gradient.abs().max()) for gradient in expected.values()) / 100
    errors = ((name, (gradients[name] - expected[name]).abs().max()) for name in expected)
    return max(float(error) / max(float(expected[name].abs().max()), smallest) for name, error in errors)


def error_of_all(gradients: Tensors, expected: Tensors) -> float:
    """Length of the difference of all gradients over theirs."""
    wanted = torch.cat([gradient.flatten() for gradient in expected.values()])
    return float((torch.cat([gradients[name].flatten() for name in expected]) - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize(
    "options",
    [
        {"config": {"activation_bits": 8}},
        {"config": {"activation_bits": 8}, "attn_implementation": "eager"},
        {"config": {"activation_clip": "max"}},
        {"config": {"weight_bits": 8, "activation_bits": 8, "embedding_bits": 8}, "hidden_act": "relu"},
        {"config": {"activation_bits": 8, "activation_clip_options": {"max_iterations": 3}}, "checkpointing": True},
        {"config": {"activation_bits": 8, "activation_granularity": TOKENS}, "hidden_act": "relu"},
        {"config": {"activation_bits": 8, "activation_granularity": HEADS}},
        {"config": {"activation_bits": 8, "asymmetric_activations": True}},
        {"config": {"activation_bits": 8, "asymmetric_activations": True, "activation_granularity": TOKENS}},
        {"config": {"activation_bits": 8}, "distilled": True},
        {"config": {"activation_bits": 8}, "learned": True},
    ],
    ids=[
        "octav",
        "eager",
        "max",
        "unsigned",
        "checkpointing",
        "tokens",
        "heads",
        "asymmetric",
        "asymmetric_tokens",
        "distilled",
        "learned",
    ],
)
def test_gradients_are_those_of_the_whole_batch(succeed: Run, ranks: int, options: dict[str, Any]) -> None:
    options = options | {"config": options["config"] | SYNCHRONIZED}
    (alone,) = succeed("train_step", 1, **options)
    together = succeed("train_step", ranks, **options)
    for rank in together:
        assert largest_error(rank["gradients"], alone["gradients"]) < 1e-10
    losses = torch.stack([rank["loss"] for rank in together])
    torch.testing.assert_close(losses.mean(), alone["loss"], rtol=1e-12, atol=0)


@pytest.mark.parametrize("clip", ["octav", "max", "mse", "percentile"])
def test_gradients_in_float32(succeed: Run, clip: str) -> None:
    options: dict[str, Any] = {"dtype": "float32", "config": {"activation_clip": clip}}
    synchronized = options | {"config": options["config"] | SYNCHRONIZED}
    (alone,) = succeed("train_step", 1, **synchronized)
    first, _ = succeed("train_step", 2, **synchronized)
    # 1.3e-7; where a sum in another order falls to the other side of a rounding, it may be this.
    assert error_of_all(first["gradients"], alone["gradients"]) < 2e-3
    apart, _ = succeed("train_step", 2, **options)
    assert error_of_all(apart["gradients"], alone["gradients"]) > 2e-2


def test_in_one_process_it_changes_nothing() -> None:
    """Equal except that octav, mse and percentile also use tables for small tensors."""
    configs = (OctavConfig(activation_clip="max", **more) for more in ({}, SYNCHRONIZED))
    plain, synchronized = (apply_octav(bert(), config).train() for config in configs)
    for model in (plain, synchronized):
        model(**batch()).loss.backward()
    for expected, got in zip(plain.parameters(), synchronized.parameters(), strict=True):
        assert torch.equal(got.grad, expected.grad) if expected.grad is not None else got.grad is None


def test_threads_of_data_parallel_without_a_gpu() -> None:
    model = apply_octav(bert(), OctavConfig()).eval()
    with torch.no_grad():
        assert torch.equal(torch.nn.DataParallel(model)(**batch()).start_logits, model(**batch()).start_logits)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("sizes", [[5, 3], [0, 8], [4, 0, 4, 0]], ids=str)
def test_evaluation_on_unequal_batches(succeed: Run, sizes: list[int], frozen: bool) -> None:
    (alone,) = succeed("forward", 1, sizes=[8], frozen=frozen, **SYNCHRONIZED)
    ranks = succeed("forward", len(sizes), sizes=sizes, frozen=frozen, **SYNCHRONIZED)
    assert [len(rank["output"]) for rank in ranks] == sizes
    torch.testing.assert_close(torch.cat([rank["output"] for rank in ranks]), alone["output"])
    assert all(rank["clips"] == ranks[0]["clips"] for rank in ranks)
    assert set(ranks[0]["clips"]) == ({"0", "2", "4"} if frozen else set())


def test_a_clip_per_token_of_unequal_batches(succeed: Run) -> None:
    """A rank without tokens takes part only in computing the sign."""
    config = {"activation_granularity": {"input": "token"}}
    (alone,) = succeed("forward", 1, sizes=[8], frozen=False, **config)
    ranks = succeed("forward", 2, sizes=[0, 8], frozen=False, **config, **SYNCHRONIZED)
    torch.testing.assert_close(torch.cat([rank["output"] for rank in ranks]), alone["output"])


@pytest.mark.parametrize("observer", ["mean", "histogram"])
@pytest.mark.parametrize(
    "fields",
    [
        *({"activation_clip": clip} for clip in ("octav", "max", "mse", "percentile")),
        {"activation_granularity": HEADS},
        {"activation_granularity": {"input": "group"}, "group_size": 32},
        {"asymmetric_activations": True},
        {"activation_clip": "max", "asymmetric_activations": True},
    ],
    ids=["octav", "max", "mse", "percentile", "heads", "groups", "asymmetric", "max, asymmetric"],
)
def test_calibration_freezes_the_clips_of_all_ranks(succeed: Run, fields: dict[str, Any], observer: str) -> None:
    options = {"batches": 2, "observer": observer, "activation_bits": 8, **fields, **SYNCHRONIZED}
    (alone,) = succeed("calibrate", 1, **options)
    for ranks in (2, 4):
        first, *others = succeed("calibrate", ranks, **options)
        assert all(other["clips"] == first["clips"] for other in others)
        assert first["clips"].keys() == alone["clips"].keys()
        for module, operands in alone["clips"].items():
            assert first["clips"][module].keys() == operands.keys()
            for operand, frozen in operands.items():
                got = first["clips"][module][operand]
                assert got["signed"] == frozen["signed"]
                assert got.get("offset", 0) == pytest.approx(frozen.get("offset", 0), rel=1e-12)
                clips = (torch.tensor(found["clips"], dtype=torch.float64) for found in (got, frozen))
                torch.testing.assert_close(*clips, rtol=1e-12, atol=0)
        torch.testing.assert_close(first["alone"], alone["alone"])
