"""The quantizer module and the linear layer made of two of them."""

import pytest
import torch
from torch import nn

from octav_hf.functional import fake_quantize, max_clip, octav_clip, percentile_clip
from octav_hf.nn import FakeQuantize, QuantizedLinear


def test_clips_with_its_rule_options_and_dim() -> None:
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    quantizer = FakeQuantize(3, clip="percentile", clip_options={"percentile": 90.0}, gradient="ste", dim=1)
    clip = percentile_clip(x, 3, dim=1, percentile=90.0)
    assert torch.equal(quantizer.compute_clip(x), clip)
    assert torch.equal(quantizer(x), fake_quantize(x, clip, 3, gradient="ste"))
    assert not torch.equal(clip, percentile_clip(x, 3, dim=1))


def test_recomputes_the_clip_at_every_call() -> None:
    x = torch.randn(100, generator=torch.Generator().manual_seed(0))
    quantizer = FakeQuantize(4)
    assert torch.allclose(quantizer(4 * x), 4 * quantizer(x))
    assert not list(quantizer.state_dict())


def test_an_error_names_where_it_stands() -> None:
    with pytest.raises(ValueError, match=r"layer.3 input: octav_clip: x of shape \(2,\).*1 NaN"):
        FakeQuantize(4, name="layer.3 input")(torch.tensor([1.0, torch.nan]))


def test_says_what_it_is() -> None:
    assert repr(FakeQuantize(4, signed=False)) == "FakeQuantize(4 bits [0, 15], clip=octav per tensor, gradient=mad)"


def test_linear_multiplies_quantized_operands() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(16, 8)
    x = torch.randn(3, 5, 16)
    weight, bias = linear.weight, linear.bias
    QuantizedLinear.convert(linear, FakeQuantize(4, dim=1), FakeQuantize(6, clip="max", gradient="pwl"))
    quantized_weight = fake_quantize(weight, octav_clip(weight, 4, dim=1), 4)
    quantized_input = fake_quantize(x, max_clip(x, 6), 6)
    assert torch.equal(linear(x), nn.functional.linear(quantized_input, quantized_weight, bias))
    linear.restore()
    assert type(linear) is nn.Linear
    assert list(linear._modules) == []
    assert linear.weight is weight


def test_linear_takes_an_empty_batch() -> None:
    linear = nn.Linear(4, 2)
    QuantizedLinear.convert(linear, FakeQuantize(4, dim=1), FakeQuantize(4))
    assert linear(torch.empty(0, 4)).shape == (0, 2)
