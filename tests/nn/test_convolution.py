"""Quantized convolutions against a float64 reference: quantized operands gathered and multiplied one tap at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from octav_hf.nn import FakeQuantize, QuantizedConv1d, QuantizedConv2d, WeightFakeQuantize
from tests import twins

Array = np.ndarray

BITS = 4
# What np.pad calls the padding modes of torch.
PAD_MODES = {"reflect": "reflect", "replicate": "edge", "circular": "wrap"}

CASES: dict[str, dict[str, Any]] = {
    "plain": {"in_channels": 3, "out_channels": 4, "kernel_size": 3},
    "pointwise": {"in_channels": 6, "out_channels": 5, "kernel_size": 1, "bias": False},
    "strided and padded": {"in_channels": 3, "out_channels": 4, "kernel_size": 3, "stride": 2, "padding": 1},
    "dilated": {"in_channels": 2, "out_channels": 4, "kernel_size": 3, "dilation": 2, "padding": 2},
    "grouped": {"in_channels": 4, "out_channels": 6, "kernel_size": 3, "groups": 2, "padding": 1},
    "depthwise": {"in_channels": 5, "out_channels": 5, "kernel_size": 3, "groups": 5, "padding": 1, "bias": False},
    "reflect": {"in_channels": 2, "out_channels": 3, "kernel_size": 3, "padding": 2, "padding_mode": "reflect"},
    "replicate": {"in_channels": 2, "out_channels": 3, "kernel_size": 3, "padding": 2, "padding_mode": "replicate"},
    "circular": {"in_channels": 2, "out_channels": 3, "kernel_size": 3, "padding": 2, "padding_mode": "circular"},
    "same": {"in_channels": 2, "out_channels": 3, "kernel_size": 3, "padding": "same"},
}


def padded_indices(size: int, padding: int, mode: str) -> Array:
    """For each padded position, the position of its value; -1 for a zero."""
    if mode == "zeros":
        return np.pad(np.arange(size), padding, constant_values=-1)
    return np.pad(np.arange(size), padding, mode=PAD_MODES[mode])


def convolution_twin(x: Array, weight: Array, bias: Array | None, grad: Array, case: dict[str, Any]) -> list[Array]:
    """Output of a 2d convolution of ``x`` with ``weight``, and the gradients of ``(output * grad).sum()`` into both.

    ``grad`` is broadcast to the output; a 1d convolution is one whose height and kernel height are 1.
    """
    stride, dilation, groups = case.get("stride", 1), case.get("dilation", 1), case.get("groups", 1)
    out_channels, per_group, kernel_height, kernel_width = weight.shape
    places = []
    for size, kernel in ((x.shape[2], kernel_height), (x.shape[3], kernel_width)):
        padding = case.get("padding", 0)
        padding = dilation * (kernel - 1) // 2 if padding == "same" else padding if kernel > 1 else 0
        places.append(padded_indices(size, padding, case.get("padding_mode", "zeros")))
    rows, columns = places
    strides = [stride if kernel > 1 else 1 for kernel in (kernel_height, kernel_width)]
    heights = (len(rows) - dilation * (kernel_height - 1) - 1) // strides[0] + 1
    widths = (len(columns) - dilation * (kernel_width - 1) - 1) // strides[1] + 1
    y = np.zeros((len(x), out_channels, heights, widths))
    grad = np.broadcast_to(grad, y.shape)
    x_grad, weight_grad = np.zeros_like(x), np.zeros_like(weight)
    for i, j in np.ndindex(heights, widths):
        for k, m in np.ndindex(kernel_height, kernel_width):
            row, column = rows[i * strides[0] + k * dilation], columns[j * strides[1] + m * dilation]
            if row < 0 or column < 0:
                continue
            for o in range(out_channels):
                first = o // (out_channels // groups) * per_group
                seen = x[:, first : first + per_group, row, column]
                y[:, o, i, j] += seen @ weight[o, :, k, m]
                weight_grad[o, :, k, m] += grad[:, o, i, j] @ seen
                x_grad[:, first : first + per_group, row, column] += np.outer(grad[:, o, i, j], weight[o, :, k, m])
    return [y if bias is None else y + bias[None, :, None, None], x_grad, weight_grad]


def check(layer: nn.Module, x: torch.Tensor, case: dict[str, Any], signed: bool, clips: Array) -> None:
    """Output and gradients of the quantized ``layer`` for ``x`` against the reference with the given weight clips."""
    x = x.clone().requires_grad_()
    y = layer(x)
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(y.shape, generator=generator)
    (y * grad).sum().backward()

    as_2d = (lambda t: twins.as_float64(t)[..., None, :]) if x.dim() == 3 else twins.as_float64
    x64, weight64 = as_2d(x), as_2d(layer.weight)
    x_clip = twins.octav_clip_twin(x64, BITS, signed)
    clips = clips.reshape(-1, 1, 1, 1)
    # No element is so near to a change of its level that float32 may honestly see it on the other side.
    assert twins.midpoint_distance_twin(x64, x_clip, BITS, signed).min() > 1e-4
    assert twins.midpoint_distance_twin(weight64, clips, BITS).min() > 1e-4
    expected, x_grad, weight_grad = convolution_twin(
        twins.quantize_twin(x64, x_clip, BITS, signed),
        twins.quantize_twin(weight64, clips, BITS),
        None if layer.bias is None else twins.as_float64(layer.bias),
        as_2d(grad),
        case,
    )
    x_grad = x_grad * twins.gradient_twin(x64, x_clip, signed, "pwl")
    weight_grad = weight_grad * twins.gradient_twin(weight64, clips, True, "mad")
    np.testing.assert_allclose(as_2d(y), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(as_2d(x.grad), x_grad, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(as_2d(layer.weight.grad), weight_grad, rtol=1e-4, atol=1e-5)
    assert (twins.gradient_twin(weight64, clips, True, "mad") < 1).any(), "no weight is clipped: the test shows less"


def quantized(layer: nn.Module, signed: bool | None) -> nn.Module:
    """The layer with 4-bit quantizers, as ``apply_octav`` would give it."""
    cls = QuantizedConv1d if isinstance(layer, nn.Conv1d) else QuantizedConv2d
    weight_quantizer = WeightFakeQuantize(BITS, gradient_estimator="mad", dim=cls.clip_dim)
    cls.convert(
        layer, {"weight": weight_quantizer, "input": FakeQuantize(BITS, gradient_estimator="pwl", signed=signed)}
    )
    assert type(layer) is cls
    return layer


@pytest.mark.parametrize("dimensions", [1, 2])
@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
@pytest.mark.parametrize("name", CASES)
def test_output_and_gradients(name: str, signed: bool, dimensions: int) -> None:
    case = CASES[name]
    torch.manual_seed(0)
    layer = quantized((nn.Conv1d if dimensions == 1 else nn.Conv2d)(**case), signed)
    x = torch.randn(2, case["in_channels"], *(6, 7)[-dimensions:])
    clips = np.array([twins.octav_clip_twin(row, BITS) for row in twins.as_float64(layer.weight)])
    check(layer, x if signed else x.relu(), case, signed, clips)


def test_one_clip_per_output_channel_and_not_per_tensor() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 4, 3)
    with torch.no_grad():
        layer.weight[1] *= 1000
    scaled = quantized(layer, True)
    clips = scaled.weight_quantizer.compute_clip(scaled.weight)
    assert clips.shape == (4, 1, 1, 1)
    assert clips[1] > 100 * clips[0]
    assert (scaled.weight_quantizer(scaled.weight)[0] != 0).float().mean() > 0.8


def test_an_unbatched_input() -> None:
    torch.manual_seed(0)
    layer = quantized(nn.Conv1d(2, 3, 3), True)
    x = torch.randn(2, 9)
    torch.testing.assert_close(layer(x), layer(x[None])[0])


def test_restored_to_what_it_was() -> None:
    layer = nn.Conv2d(2, 2, 1)
    weight = layer.weight
    quantized(layer, True).restore()
    assert type(layer) is nn.Conv2d
    assert layer.weight is weight
    assert list(layer._modules) == []
