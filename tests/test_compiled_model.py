"""torch.compile of a quantized model: attention and clips stay outside, the result is that of the model as it is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import BertForQuestionAnswering, ResNetForImageClassification

from octav_hf import OctavConfig, apply_octav, calibrate_octav

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("implementation", "embedding_bits"), [("eager", None), ("sdpa", 4)])
def test_logits_and_gradients(
    small_bert: Callable[..., BertForQuestionAnswering],
    padded_batch: dict,
    implementation: str,
    embedding_bits: int | None,
) -> None:
    torch.compiler.reset()
    settings = {"attn_implementation": implementation, "num_hidden_layers": 1}
    config = OctavConfig(embedding_bits=embedding_bits)
    model, other = (apply_octav(small_bert(**settings), config) for _ in range(2))
    compiled = torch.compile(other, backend="aot_eager")
    expected, got = model(**padded_batch), compiled(**padded_batch)
    torch.testing.assert_close(got.start_logits, expected.start_logits, rtol=1e-4, atol=1e-5)
    expected.start_logits.square().sum().backward()
    got.start_logits.square().sum().backward()
    for (name, parameter), twin in zip(model.named_parameters(), other.parameters(), strict=True):
        if parameter.grad is not None:
            torch.testing.assert_close(
                twin.grad, parameter.grad, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
            )
    with torch.no_grad():
        expected, got = model(**padded_batch), compiled(**padded_batch)
        torch.testing.assert_close(got.start_logits, expected.start_logits)
        torch.testing.assert_close(got.end_logits, expected.end_logits)


def test_a_convolutional_model(small_resnet: Callable[..., ResNetForImageClassification]) -> None:
    torch.compiler.reset()
    model, other = (apply_octav(small_resnet(depths=[1, 1]), OctavConfig()) for _ in range(2))
    compiled = torch.compile(other, backend="aot_eager")
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    expected, got = model(images).logits, compiled(images).logits
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    expected.square().sum().backward()
    got.square().sum().backward()
    for (name, parameter), twin in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(twin.grad, parameter.grad, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(("implementation", "masked"), [("eager", True), ("sdpa", False)])
def test_frozen_clips(
    small_bert: Callable[..., BertForQuestionAnswering], padded_batch: dict, implementation: str, masked: bool
) -> None:
    """Each operand of attention is counted once, for it has as many clips as uses."""
    torch.compiler.reset()
    batch = padded_batch if masked else {"input_ids": padded_batch["input_ids"]}
    model = apply_octav(small_bert(attn_implementation=implementation), OctavConfig())
    calibrate_octav(model, [batch], progress_bar=False)
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(**batch).start_logits, model(**batch).start_logits)


@pytest.mark.parametrize(("mode", "frozen"), [("train", False), ("eval", True)], ids=["train", "eval_frozen"])
def test_new_batch_sizes_and_lengths_are_not_compiled_anew(
    small_bert: Callable[..., BertForQuestionAnswering], padded_batch: dict, mode: str, frozen: bool
) -> None:
    """Torch compiles a size of 1 apart, and gives a size up as a constant when it changes for the first time."""
    torch.compiler.reset()
    settings = {"num_hidden_layers": 1, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    models = [apply_octav(small_bert(**settings), OctavConfig()) for _ in range(2)]
    if frozen:
        models = [calibrate_octav(model, [padded_batch], progress_bar=False) for model in models]
    model, other = (getattr(model, mode)() for model in models)
    compiled = torch.compile(other, backend="eager")

    def graphs_after(*sizes: tuple[int, int]) -> int:
        for batch, length in sizes:
            ids = torch.randint(0, 100, (batch, length), generator=torch.Generator().manual_seed(length))
            mask = torch.ones_like(ids)
            mask[-1, length // 2 :] = 0
            with torch.set_grad_enabled(mode == "train"):
                expected, got = (run(input_ids=ids, attention_mask=mask).start_logits for run in (model, compiled))
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
            if mode == "train":
                weights = model.qa_outputs.weight, other.qa_outputs.weight
                gradient, twin = (
                    torch.autograd.grad(logits.square().sum(), weight)[0]
                    for logits, weight in zip((expected, got), weights, strict=True)
                )
                torch.testing.assert_close(twin, gradient, rtol=1e-3, atol=1e-4)
        return counters["stats"]["unique_graphs"]

    counters.clear()
    with torch._dynamo.config.patch(recompile_limit=64):  # at which torch would stop compiling, and hide what it counts
        first = graphs_after((2, 16), (3, 24), (1, 7))
        later = graphs_after((4, 33), (2, 60), (7, 11), (5, 40), (1, 20))
    assert 0 < first < 60
    assert later == first
