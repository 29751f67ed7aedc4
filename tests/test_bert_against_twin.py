"""Acceptance: BertForQuestionAnswering with apply_octav equals an independent float64 BERT, including gradients."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import pytest
import torch
from transformers import BertConfig, BertForQuestionAnswering

from octav_hf import OctavConfig, apply_octav
from tests.bert_twin import Quantization, bert_for_question_answering, question_answering_loss

Tensor = torch.Tensor

LENGTH = 10
# weight bits, activation bits, excluded modules
SETTINGS: dict[str, tuple[int | None, int | None, tuple[str, ...]]] = {
    "w4a4": (4, 4, ()),
    "w8a8": (8, 8, ()),
    "w2a6": (2, 6, ()),
    "w4_only": (4, None, ()),
    "a4_only": (None, 4, ()),
    "w4a4-without_qa_outputs": (4, 4, ("qa_outputs",)),
    "w4a4-tokens_and_channels": (4, 4, ()),
    "w4a4-heads": (4, 4, ()),
    "w8a8-mixed": (8, 8, ()),
}
# Of those settings whose activations have not one clip per tensor.
GRANULARITY: dict[str, dict[str, str]] = {
    "w4a4-tokens_and_channels": {
        **dict.fromkeys(("input", "query", "key", "probabilities"), "token"),
        "value": "channel",
    },
    "w4a4-heads": dict.fromkeys(("query", "key", "probabilities", "value"), "attn_head"),
    "w8a8-mixed": {"input": "token", "key": "attn_head", "probabilities": "token"},
}
IMPLEMENTATIONS = pytest.mark.parametrize("implementation", ["eager", "sdpa"])
MODES = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def float_model(
    seed: int, implementation: str = "sdpa", dtype: torch.dtype = torch.float64
) -> BertForQuestionAnswering:
    """A random 2-layer BERT; its weights are float32 values, whatever dtype they are held in."""
    config = BertConfig(
        vocab_size=60,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.3,
        attn_implementation=implementation,
    )
    torch.manual_seed(seed)
    model = BertForQuestionAnswering(config)
    for parameter in model.parameters():
        if parameter.ndim == 1:  # biases and LayerNorms as a trained model has them, not 0 and 1
            parameter.data += 0.2 * torch.randn_like(parameter)
    # Values of one channel share their sign, so that no sum over probabilities * values cancels: see `zero_margin`.
    for layer in model.bert.encoder.layer:
        layer.attention.self.value.weight.data *= 0.3
        layer.attention.self.value.bias.data += torch.tensor([2.0, -2.0, 2.0, -2.0]).repeat(8)
    assert model.config._attn_implementation == implementation
    return model.to(dtype)


def batch(seed: int) -> dict[str, Tensor]:
    """Two sequences, the second one padded (with token ids that are not the padding id, so that a leak shows)."""
    generator = torch.Generator().manual_seed(seed)
    attention_mask = torch.ones(2, LENGTH, dtype=torch.long)
    attention_mask[1, 6:] = 0
    token_type_ids = torch.zeros(2, LENGTH, dtype=torch.long)
    token_type_ids[:, 3:] = 1
    return {
        "input_ids": torch.randint(1, 60, (2, LENGTH), generator=generator),
        "attention_mask": attention_mask,
        "token_type_ids": token_type_ids,
        "start_positions": torch.tensor([4, 3]),
        "end_positions": torch.tensor([7, 5]),
    }


@dataclass
class Result:
    """One forward and backward pass: logits, loss, and the gradient of every parameter by name."""

    start: Tensor
    end: Tensor
    loss: Tensor
    gradients: dict[str, Tensor]
    midpoint_margin: float = 0.0
    clip_margin: float = 0.0
    zero_margin: float = 0.0


@functools.cache
def twin(setting: str, seed: int) -> Result:
    """The float64 twin's pass."""
    weight_bits, activation_bits, exclude = SETTINGS[setting]
    model, inputs = float_model(seed), batch(seed)
    state = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    quantization = Quantization(
        weight_bits, activation_bits, exclude=exclude, granularity=GRANULARITY.get(setting, {}), round_clips=False
    )
    ids, mask, types = inputs["input_ids"], inputs["attention_mask"], inputs["token_type_ids"]
    start, end = bert_for_question_answering(state, model.config, ids, mask, types, quantization)
    loss = question_answering_loss(start, end, inputs["start_positions"], inputs["end_positions"])
    loss.backward()
    gradients = {name: p.grad for name, p in state.items() if p.grad is not None}
    margins = quantization.midpoint_margin, quantization.clip_margin, quantization.zero_margin
    return Result(start.detach(), end.detach(), loss.detach(), gradients, *margins)


def library(setting: str, seed: int, implementation: str, training: bool, dtype: torch.dtype) -> Result:
    """The pass of a Transformers model with apply_octav."""
    weight_bits, activation_bits, exclude = SETTINGS[setting]
    model = float_model(seed, implementation, dtype)
    config = OctavConfig(
        weight_bits=weight_bits,
        activation_bits=activation_bits,
        activation_granularity=GRANULARITY.get(setting),
        exclude_modules=list(exclude),
    )
    apply_octav(model, config)
    model.train(training)
    output = model(**batch(seed))
    output.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return Result(output.start_logits.detach(), output.end_logits.detach(), output.loss.detach(), gradients)


def assert_close(got: Result, expected: Result, tolerance: float, gradient_tolerance: float) -> None:
    """Logits, loss and gradients are equal up to a tolerance times the largest value of the tensor."""
    assert got.gradients.keys() == expected.gradients.keys()
    for name in ("start", "end", "loss"):
        g, e = getattr(got, name), getattr(expected, name)
        assert float((g.double() - e).abs().max()) <= tolerance * float(e.abs().max()), name
    # The gradient of a key's bias, say, is 0 up to rounding: nothing to be relative to.
    floor = 1e-2 * max(float(gradient.abs().max()) for gradient in expected.gradients.values())
    for name, e in expected.gradients.items():
        error = float((got.gradients[name].double() - e).abs().max())
        assert error <= gradient_tolerance * max(float(e.abs().max()), floor), name


@MODES
@IMPLEMENTATIONS
@pytest.mark.parametrize("setting", SETTINGS)
def test_float64_model_equals_the_twin(setting: str, implementation: str, training: bool) -> None:
    """In float64 only the order of sums differs, so no value is rounded differently: equal to 1e-9."""
    expected = twin(setting, seed=0)
    assert min(expected.midpoint_margin, expected.clip_margin, expected.zero_margin) > 1e-8
    got = library(setting, 0, implementation, training, torch.float64)
    assert_close(got, expected, 1e-9, 1e-9)
    assert len(expected.gradients) >= 39


# Seeds whose activations all keep clear of every rounding midpoint and every clip, by more than float32's rounding.
FLOAT32_SEEDS: dict[str, int] = {"w4a4": 2, "w8a8": 25, "w4_only": 0, "a4_only": 4, "w4a4-without_qa_outputs": 2}


@MODES
@IMPLEMENTATIONS
@pytest.mark.parametrize("setting", FLOAT32_SEEDS)
def test_float32_model_equals_the_twin(setting: str, implementation: str, training: bool) -> None:
    """In float32, with data that cannot be rounded differently, equal to float32 accuracy."""
    seed = FLOAT32_SEEDS[setting]
    expected = twin(setting, seed)
    assert expected.midpoint_margin > (1e-4 if setting == "w8a8" else 5e-5)
    assert expected.clip_margin > 5e-5
    got = library(setting, seed, implementation, training, torch.float32)
    assert_close(got, expected, 1e-4, 1e-3)


@pytest.mark.parametrize("setting", ["w4a4", "w8a8"])
def test_quantization_is_felt(setting: str) -> None:
    """The results are far from the float model, so the tolerance cannot hide a missing quantizer."""
    expected, model = twin(setting, 0), float_model(0)
    with torch.no_grad():
        start = model(**batch(0)).start_logits
    assert (start - expected.start).abs().max() > 1e-3
