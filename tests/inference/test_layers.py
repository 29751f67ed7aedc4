"""Converted layers against int64 sums of the integers of their quantizers and packed weights."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from octav_hf import OctavConfig, apply_octav, calibrate_octav, convert_octav
from octav_hf.nn import PackedLayer
from octav_hf.nn.codes import Grid

LAYERS = {
    "linear": lambda: nn.Linear(24, 12),
    "linear without bias": lambda: nn.Linear(24, 12, bias=False),
    "Conv1D": lambda: Conv1D(12, 24),
    "conv1d": lambda: nn.Conv1d(24, 12, 3, padding=1),
    "conv2d": lambda: nn.Conv2d(4, 12, 3, stride=2, padding=1),
    "grouped": lambda: nn.Conv2d(4, 12, (3, 1), padding=(2, 0), dilation=(2, 1), groups=2, bias=False),
    "depthwise": lambda: nn.Conv2d(4, 4, 3, padding=1, groups=4),
    "padded by repeating": lambda: nn.Conv2d(4, 12, 3, padding=1, padding_mode="circular"),
    "padded to the same size": lambda: nn.Conv2d(4, 12, 3, padding="same"),
}
GRIDS: dict[str, dict[str, Any]] = {
    "4 and 8 bits": {"weight_bits": 4, "activation_bits": 8},
    "8 and 8 bits, per tensor": {"weight_bits": 8, "activation_bits": 8, "weight_granularity": "tensor"},
    "3 and 5 bits, mse": {"weight_bits": 3, "activation_bits": 5, "weight_clip": "mse", "activation_clip": "mse"},
}
OF_LINEAR: dict[str, dict[str, Any]] = {
    "per token": {"activation_granularity": {"input": "token"}},
    "asymmetric": {"asymmetric_activations": True},
    "per token, asymmetric": {"activation_granularity": {"input": "token"}, "asymmetric_activations": True},
}
CASES = [(layer, grid) for layer in LAYERS for grid in GRIDS]
CASES += [(layer, grid) for layer in ("linear", "linear without bias", "Conv1D") for grid in OF_LINEAR]


def model_and_input(name: str, config: dict[str, Any]) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(LAYERS[name]())
    convolution = isinstance(model[0], nn.Conv1d | nn.Conv2d)
    shape = (2, model[0].in_channels, *[9] * (model[0].weight.dim() - 2)) if convolution else (2, 9, 24)
    x = torch.randn(shape)
    if config.get("asymmetric_activations"):
        x = nn.functional.gelu(x)
    return apply_octav(model, OctavConfig(**config)), x


def by_hand(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """The layer's output in float64, computed by int64 sums from the quantizers' results."""
    quantizer, packed = layer.input_quantizer, layer.weight_quantizer
    frozen = quantizer.frozen
    grid = quantizer.dynamic_grid(x) if frozen is None else Grid(frozen.signed, frozen.clips[0], frozen.offset)
    step = grid.clip.double() / 2 ** (quantizer.num_bits - int(grid.signed))
    offset = torch.zeros(()) if grid.offset is None else grid.offset.double()
    codes = ((quantizer(x).double() - offset) / torch.where(step == 0, 1, step)).round()
    shape = (-1, *[1] * (layer.weight.dim() - 2))
    weight = layer.weight.double().t() if isinstance(layer, Conv1D) else layer.weight.double()
    scale = packed.scale.double()
    integers = (weight / scale.view(*shape, 1)).round()
    bias = 0 if layer.bias is None else layer.bias.double().view(shape)
    if isinstance(layer, nn.Conv1d | nn.Conv2d):  # torch has no convolution of int64; these sums are exact in float64
        return layer._conv_forward(codes, integers, None) * (step * scale).view(shape) + bias
    sums = codes.long() @ integers.long().t()
    return (sums * step + offset * integers.sum(1)) * scale + (0 if layer.bias is None else layer.bias.double())


@pytest.mark.filterwarnings("ignore:Integer matmuls are computed in floating point")
@pytest.mark.parametrize("frozen", [False, True], ids=["dynamic", "frozen"])
@pytest.mark.parametrize(("name", "grid"), CASES)
def test_output_is_that_of_integers(name: str, grid: str, frozen: bool) -> None:
    model, x = model_and_input(name, GRIDS.get(grid) or OF_LINEAR[grid])
    if frozen:
        calibrate_octav(model, [(x,)], weights=True)
    with torch.no_grad():
        for reference in (True, False):
            layer = convert_octav(model, reference=reference)[0]
            assert isinstance(layer, PackedLayer)
            result, expected = layer(x), by_hand(layer, x)
            assert result.dtype == x.dtype
            assert result.stride() == LAYERS[name]()(x).stride()
            assert (result.double() - expected).abs().max() < 3e-7 * expected.abs().max()


@pytest.mark.parametrize("name", ["linear", "conv2d", "padded to the same size"])
@pytest.mark.filterwarnings("ignore:Integer matmuls are computed in floating point")
def test_empty_and_single_inputs(name: str) -> None:
    model, x = model_and_input(name, {})
    layer = convert_octav(calibrate_octav(model, [(x,)], weights=True))[0]
    with torch.no_grad():
        assert layer(x[:0]).shape == (0, *layer(x).shape[1:])
        assert torch.equal(layer(x[0]), layer(x)[0])


def test_a_sign_that_the_data_decide() -> None:
    model, x = model_and_input("linear", {"weight_bits": 4, "activation_bits": 4})
    layer = convert_octav(model)[0]
    with torch.no_grad():
        for values in (x, x.relu(), torch.zeros_like(x)):
            torch.testing.assert_close(layer(values).double(), by_hand(layer, values), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.filterwarnings("ignore:Integer matmuls are computed in floating point")
def test_other_dtypes(dtype: torch.dtype) -> None:
    model, x = model_and_input("linear", {"weight_bits": 4, "activation_bits": 8})
    model, x = model.to(dtype), x.to(dtype)
    layer = convert_octav(model)[0]
    with torch.no_grad():
        result, expected = layer(x), by_hand(layer, x)
    assert result.dtype == dtype
    assert (result.double() - expected).abs().max() < torch.finfo(dtype).eps * 2 * expected.abs().max()
