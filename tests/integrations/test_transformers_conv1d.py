"""Transformers' Conv1D equals a linear layer with the transposed weight, and is restored correctly."""

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from octav_hf import OctavConfig, apply_octav, check_coverage, coverage_report, remove_octav
from octav_hf.integrations import QuantizedTransformersConv1D


def conv1d_and_linear() -> tuple[nn.Sequential, nn.Sequential]:
    """A ``Conv1D`` from 20 to 3 features, and a linear layer that computes the same."""
    torch.manual_seed(0)
    conv, linear = Conv1D(3, 20), nn.Linear(20, 3)
    with torch.no_grad():
        conv.bias.normal_()
        linear.weight.copy_(conv.weight.t())
        linear.bias.copy_(conv.bias)
    return nn.Sequential(conv), nn.Sequential(linear)


def test_output_and_gradients_are_those_of_a_linear_layer() -> None:
    conv, linear = (apply_octav(net, OctavConfig(weight_bits=3)) for net in conv1d_and_linear())
    x = torch.randn(2, 4, 20, generator=torch.Generator().manual_seed(1))
    output, expected = conv(x), linear(x)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-6)
    output.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(conv[0].weight.grad, linear[0].weight.grad.t(), rtol=1e-5, atol=1e-6)
    quantized = conv[0].weight_quantizer(conv[0].weight)
    assert all(column.unique().numel() <= 8 for column in quantized.t())


def test_is_reported_and_checked_as_a_linear_layer() -> None:
    conv, _ = conv1d_and_linear()
    before = conv(torch.ones(2, 20))
    apply_octav(conv, OctavConfig())
    assert type(conv[0]) is QuantizedTransformersConv1D
    assert [(row.kind, row.operand, row.bits) for row in coverage_report(conv)] == [
        ("linear", "weight", 4),
        ("linear", "input", 4),
    ]
    assert check_coverage(conv, torch.ones(2, 20)) == []
    assert type(remove_octav(conv)[0]) is Conv1D
    assert torch.equal(conv(torch.ones(2, 20)), before)
