"""The quantizer module, and the linear layer with two of them."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from octav_hf.functional import CLIP_RULES, fake_quantize, max_clip, octav_clip, percentile_clip, register_clip_rule
from octav_hf.nn import FakeQuantize, QuantizedLinear


def test_clips_with_its_rule_options_and_dim() -> None:
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    quantizer = FakeQuantize(3, clip="percentile", clip_options={"percentile": 90.0}, gradient_estimator="ste", dim=1)
    clip = percentile_clip(x, 3, dim=1, percentile=90.0)
    assert torch.equal(quantizer.compute_clip(x), clip)
    assert torch.equal(quantizer(x), fake_quantize(x, clip, 3, gradient="ste"))
    assert not torch.equal(clip, percentile_clip(x, 3, dim=1))


def test_recomputes_the_clip_at_every_call() -> None:
    x = torch.randn(100, generator=torch.Generator().manual_seed(0))
    quantizer = FakeQuantize(4)
    assert torch.allclose(quantizer(4 * x), 4 * quantizer(x))
    assert not list(quantizer.state_dict())


@pytest.mark.parametrize("place", [0, 1, -1], ids=["first value", "first sample", "last value"])
def test_by_sign_one_negative_value_makes_it_signed(place: int) -> None:
    x = torch.rand(4, 25, generator=torch.Generator().manual_seed(0))
    quantizer = FakeQuantize(4, gradient_estimator="pwl", signed=None)
    unsigned = fake_quantize(x, octav_clip(x, 4, signed=False), 4, signed=False, gradient="pwl")
    assert torch.equal(quantizer(x), unsigned)
    assert unsigned.unique().numel() == 16
    x.view(-1)[place] = -1e-6
    assert torch.equal(quantizer(x), fake_quantize(x, octav_clip(x, 4), 4))
    x.view(-1)[place] = 0
    assert not quantizer.is_signed(x)


def test_by_sign_the_gradient_is_that_of_the_grid() -> None:
    x = torch.tensor([0.0, 0.5, 1.0, 30.0])
    for values, signed in ((x, False), (torch.cat([x, -x]), True)):
        values = values.clone().requires_grad_()
        quantizer = FakeQuantize(4, gradient_estimator="mad", signed=None)
        clip = quantizer.compute_clip(values)
        quantizer(values).sum().backward()
        assert torch.equal(clip, octav_clip(values, 4, signed=signed))
        expected = torch.where(values.abs() > clip, clip / values.abs(), 1.0)
        torch.testing.assert_close(values.grad, expected.detach())


def test_by_sign_of_no_values_and_of_nan() -> None:
    quantizer = FakeQuantize(4, signed=None)
    assert quantizer(torch.empty(0, 3)).shape == (0, 3)
    assert quantizer(torch.tensor(2.0)) > 1
    with pytest.raises(ValueError, match="1 NaN"):
        quantizer(torch.tensor([1.0, torch.nan]))


def test_an_error_names_where_it_stands() -> None:
    with pytest.raises(ValueError, match=r"layer.3 input: octav_clip: x of shape \(2,\).*1 NaN"):
        FakeQuantize(4, name="layer.3 input")(torch.tensor([1.0, torch.nan]))


@pytest.mark.parametrize(
    ("clips", "message"),
    [
        (lambda x, dim: x.abs().amax(dim), r"the clip rule 'mine' returned a tensor of shape \(3,\) for x of shape "),
        (lambda x, dim: x.abs().max().item(), r"returned a float for x of shape \(3, 3\) and dim=1; it must return a "),
        (
            lambda x, dim: x.log().amax(dim, keepdim=True),
            r"returned NaN, Inf or a negative clip for x of shape \(3, 3\)",
        ),
        (
            lambda x, dim: -x.abs().amax(dim, keepdim=True),
            r"returned NaN, Inf or a negative clip for x of shape \(3, 3\)",
        ),
    ],
    ids=["shape", "number", "nan", "negative"],
)
def test_an_invalid_clip_of_a_users_rule_is_an_error(
    clips: Callable[[torch.Tensor, int], object], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a square matrix, clips of shape [3] would be those of columns."""
    monkeypatch.setattr("octav_hf.functional.registry.CLIP_RULES", dict(CLIP_RULES))
    register_clip_rule("mine")(lambda x, num_bits, *, signed, dim: clips(x, dim))
    with pytest.raises(ValueError, match=r"^dense weight: .*" + message):
        FakeQuantize(4, clip="mine", dim=1, name="dense weight")(torch.arange(-4.0, 5.0).view(3, 3))


@pytest.mark.parametrize("signed", [True, None])
def test_nan_under_a_users_rule_names_where_it_stands(signed: bool | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("octav_hf.functional.registry.CLIP_RULES", dict(CLIP_RULES))
    register_clip_rule("mine")(lambda x, num_bits, *, signed, dim: x.float().square().mean().sqrt())
    quantizer = FakeQuantize(4, clip="mine", signed=signed, name="layer.3 input")
    assert quantizer(torch.empty(0, 3)).shape == (0, 3)
    assert quantizer.compute_clip(torch.ones(3, dtype=torch.float64, requires_grad=True)).dtype == torch.float64
    with pytest.raises(ValueError, match=r"^layer.3 input: mine: x of shape \(2,\) .* holds 1 NaN"):
        quantizer(torch.tensor([1.0, torch.nan]))


def test_says_what_it_is() -> None:
    assert "4 bits [-8, 7] or [0, 15], clip=octav" in repr(FakeQuantize(4, signed=None))
    assert (
        repr(FakeQuantize(4, signed=False))
        == "FakeQuantize(4 bits [0, 15], clip=octav per tensor, gradient_estimator=mad)"
    )


def test_linear_multiplies_quantized_operands() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(16, 8)
    x = torch.randn(3, 5, 16)
    weight, bias = linear.weight, linear.bias
    QuantizedLinear.convert(
        linear, {"weight": FakeQuantize(4, dim=1), "input": FakeQuantize(6, clip="max", gradient_estimator="pwl")}
    )
    quantized_weight = fake_quantize(weight, octav_clip(weight, 4, dim=1), 4)
    quantized_input = fake_quantize(x, max_clip(x, 6), 6)
    assert torch.equal(linear(x), nn.functional.linear(quantized_input, quantized_weight, bias))
    linear.restore()
    assert type(linear) is nn.Linear
    assert list(linear._modules) == []
    assert linear.weight is weight


def test_linear_takes_an_empty_batch() -> None:
    linear = nn.Linear(4, 2)
    QuantizedLinear.convert(linear, {"weight": FakeQuantize(4, dim=1), "input": FakeQuantize(4)})
    assert linear(torch.empty(0, 4)).shape == (0, 2)
