"""Layers that read the same tensor quantize it once, and never use a wrong result."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from octav_hf import OctavConfig, apply_octav
from octav_hf.nn import FakeQuantize
from octav_hf.nn.shared_inputs import quantize_input, shared_inputs

Tensor = torch.Tensor


@pytest.fixture
def x() -> Tensor:
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()


def test_one_result_for_one_tensor(x: Tensor) -> None:
    with shared_inputs():
        first = quantize_input(FakeQuantize(4, name="query"), x)
        assert quantize_input(FakeQuantize(4, name="key"), x) is first
        assert quantize_input(FakeQuantize(4), x.clone()) is not first
    assert quantize_input(FakeQuantize(4), x) is not first


@pytest.mark.parametrize(
    "other",
    [
        FakeQuantize(8),
        FakeQuantize(4, clip="max"),
        FakeQuantize(4, clip_options={"max_iterations": 1}),
        FakeQuantize(4, gradient_estimator="ste"),
        FakeQuantize(4, signed=False),
        FakeQuantize(4, signed=None),
        FakeQuantize(4, dim=1),
    ],
    ids=["bits", "clip", "options", "gradient", "unsigned", "by sign", "dim"],
)
def test_other_settings_are_another_result(x: Tensor, other: FakeQuantize) -> None:
    with shared_inputs():
        quantize_input(FakeQuantize(4), x)
        assert torch.equal(quantize_input(other, x), other(x))


def test_a_tensor_changed_in_place_is_another(x: Tensor) -> None:
    quantizer = FakeQuantize(4)
    with shared_inputs(), torch.no_grad():
        quantize_input(quantizer, x)
        x.mul_(3)
        assert torch.equal(quantize_input(quantizer, x), quantizer(x))


def test_without_gradient_is_not_given_where_one_is_wanted(x: Tensor) -> None:
    with shared_inputs():
        with torch.no_grad():
            assert not quantize_input(FakeQuantize(4), x).requires_grad
        assert quantize_input(FakeQuantize(4), x).requires_grad


def test_inference_mode() -> None:
    with torch.inference_mode(), shared_inputs():
        x = torch.randn(4, 8)
        assert quantize_input(FakeQuantize(4), x) is quantize_input(FakeQuantize(4), x)


def test_query_key_and_value_of_a_model_share(small_bert, padded_batch: dict) -> None:
    """Seven operands per layer are quantized instead of nine; gradients are the same as without sharing."""
    model = apply_octav(small_bert(), OctavConfig())
    calls: list[tuple[str, bool]] = []
    inputs = [(n, m) for n, m in model.named_modules() if isinstance(m, FakeQuantize) and n.endswith("input_quantizer")]
    for name, quantizer in inputs:
        quantizer.register_forward_hook(
            lambda module, args, kwargs, output, name=name: calls.append((name, "known" in kwargs)), with_kwargs=True
        )
    output = model(**padded_batch)
    (output.start_logits.sum() + output.end_logits.square().sum()).backward()
    assert len(calls) == len(inputs) == 2 * 6 + 1  # hooks run for all of them
    computed = [name for name, is_known in calls if not is_known]
    assert len([name for name in computed if ".attention.self." in name]) == 2
    assert len(computed) == 2 * 4 + 1

    alone = apply_octav(small_bert(), OctavConfig())
    for module in alone.modules():
        if isinstance(module, nn.Linear):
            module.input_quantizer = nn.Sequential(module.input_quantizer)  # no FakeQuantize, so it is not shared
    expected = alone(**padded_batch)
    (expected.start_logits.sum() + expected.end_logits.square().sum()).backward()
    assert torch.equal(output.start_logits, expected.start_logits)
    for parameter, other in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-4, atol=1e-6)
