"""``asymmetric_activations``: the unsigned grid that begins at a tensor's lowest value."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from octav_hf import (
    OctavConfig,
    apply_octav,
    calibrate_octav,
    check_coverage,
    coverage_report,
    pack_octav,
    uncalibrate_octav,
)
from octav_hf.nn import FakeQuantize, FrozenClips
from tests import twins
from tests.frozen_activations import frozen_activations

Tensor = torch.Tensor


def gelu_output(*shape: int, seed: int = 0) -> Tensor:
    return nn.functional.gelu(1.5 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed)))


def asymmetric_twin(x: Any, clip: float, offset: float, num_bits: int) -> np.ndarray:
    return twins.quantize_twin(twins.as_float64(x) - offset, clip, num_bits, signed=False) + offset


def quantizer(**settings: Any) -> FakeQuantize:
    return FakeQuantize(**{"num_bits": 4, "gradient_estimator": "pwl", "signed": None, "asymmetric": True} | settings)


@pytest.mark.parametrize("num_bits", [2, 4, 8])
def test_gelus_output_equals_the_twin(num_bits: int) -> None:
    x = gelu_output(6, 200)
    offset = float(x.min())
    clip = twins.octav_clip_twin(x - x.min(), num_bits, signed=False)
    out = quantizer(num_bits=num_bits)(x)
    np.testing.assert_allclose(out.numpy(), asymmetric_twin(x, clip, offset, num_bits), atol=2e-4)
    assert float(out.min()) == offset
    # That is what it is for: an error far below that of the signed grid.
    signed = quantizer(num_bits=num_bits, asymmetric=False)(x)
    assert (out - x).square().mean() < 0.6 * (signed - x).square().mean()


def test_a_clip_per_token_and_one_offset() -> None:
    x = gelu_output(3, 5, 60)
    out = quantizer(dim=-1)(x)
    for row, got in zip(x.flatten(0, 1), out.flatten(0, 1), strict=True):
        clip = twins.octav_clip_twin(row - x.min(), 4, signed=False)
        np.testing.assert_allclose(got.numpy(), asymmetric_twin(row, clip, float(x.min()), 4), atol=1e-4)


@pytest.mark.parametrize(
    ("x", "grid"),
    [
        (torch.randn(4000, generator=torch.Generator().manual_seed(1)), "signed"),  # its tail below is clipped
        (torch.rand(4000, generator=torch.Generator().manual_seed(1)), "unsigned"),
        (nn.functional.silu(2 * torch.randn(4000, generator=torch.Generator().manual_seed(1))), "asymmetric"),
        (torch.rand(4000, generator=torch.Generator().manual_seed(1)) - 0.001, "asymmetric"),
    ],
    ids=["gaussian", "no_negative", "silu", "barely_negative"],
)
def test_which_grid_a_tensor_gets(x: Tensor, grid: str) -> None:
    found = quantizer().dynamic_grid(x)
    assert (bool(found.signed), bool(found.offset < 0)) == (grid == "signed", grid == "asymmetric")
    if grid != "asymmetric":
        assert torch.equal(quantizer()(x), quantizer(asymmetric=False)(x))


def test_clips_decide_on_average() -> None:
    """A token with small values, whose clip is below the lowest value of others, does not make the tensor signed."""
    x = gelu_output(10, 200)
    x[3] *= 0.01
    assert -x.min() > twins.octav_clip_twin(x[3], 4)
    assert quantizer(dim=-1).dynamic_grid(x).offset < 0


def test_a_sign_that_is_given_is_kept() -> None:
    x = gelu_output(500)
    for signed in (True, False):
        assert torch.equal(quantizer(signed=signed)(x), quantizer(signed=signed, asymmetric=False)(x))


@pytest.mark.parametrize("gradient", ["ste", "pwl", "mad"])
def test_the_gradient_is_that_of_the_unsigned_grid_on_the_difference(gradient: str) -> None:
    x = gelu_output(300).requires_grad_()
    incoming = torch.randn(300, generator=torch.Generator().manual_seed(2))
    (quantizer(gradient_estimator=gradient)(x) * incoming).sum().backward()
    difference = x.detach() - x.detach().min()
    clip = twins.octav_clip_twin(difference, 4, signed=False)
    expected = twins.gradient_twin(difference, clip, False, gradient) * incoming.numpy()
    np.testing.assert_allclose(x.grad.numpy(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    x = gelu_output(500).to(dtype)
    out = quantizer()(x)
    assert out.dtype == dtype
    clip = twins.octav_clip_twin(x.double() - x.double().min(), 4, signed=False)
    expected = asymmetric_twin(x.double(), clip, float(x.min()), 4)
    np.testing.assert_allclose(out.double().numpy(), expected, atol=1e-2 if dtype is torch.bfloat16 else 2e-3)


def test_nothing_and_nan() -> None:
    assert quantizer()(torch.zeros(0, 3)).shape == (0, 3)
    with pytest.raises(ValueError, match="1 NaN"):
        quantizer()(torch.tensor([1.0, -0.1, float("nan")]))


def test_the_shift_factors_out_of_the_product() -> None:
    """The result equals a scaled integer matmul plus a constant per output feature, as in an integer kernel."""
    torch.manual_seed(0)
    layer = apply_octav(nn.Sequential(nn.Linear(64, 8)), OctavConfig(asymmetric_activations=True)).double()[0]
    x = gelu_output(10, 64).double()
    grid = layer.input_quantizer.dynamic_grid(x)
    assert grid.offset is not None
    step = float(grid.clip) / 16
    levels = ((x - grid.offset) / step).round().clamp(0, 15)
    weight = layer.weight_quantizer(layer.weight)
    expected = step * (levels @ weight.T) + grid.offset * weight.sum(dim=1) + layer.bias
    torch.testing.assert_close(layer(x), expected, rtol=1e-10, atol=1e-12)


def bert() -> BertForSequenceClassification:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, num_labels=3
    )
    return BertForSequenceClassification(config).eval()


def tokens(seed: int = 0) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(0, 50, (4, 12), generator=torch.Generator().manual_seed(seed))}


CONFIGS = {"per_tensor": OctavConfig(asymmetric_activations=True), "accurate": OctavConfig.accurate()}


def asymmetric_inputs(model: nn.Module) -> list[str]:
    return [row.module for row in coverage_report(model) if row.bits is not None and row.cells()[3] == "asymmetric"]


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS.values(), ids=list(CONFIGS))
def test_a_model_calibrated_packed_saved_and_exported(config: OctavConfig, tmp_path: Path) -> None:
    model = apply_octav(bert(), config)
    assert not check_coverage(model, tokens())
    assert {row.cells()[3] for row in coverage_report(model) if row.operand == "input"} == {"by range"}
    with torch.no_grad():
        dynamic = model(**tokens()).logits
        plain = apply_octav(bert(), replace(config, asymmetric_activations=False))(**tokens()).logits
    assert not torch.equal(dynamic, plain)
    calibrate_octav(model, [tokens(seed) for seed in range(3)], progress_bar=False)
    gelu_inputs = [f"bert.encoder.layer.{i}.output.dense" for i in range(2)]
    assert set(gelu_inputs) <= set(asymmetric_inputs(model))
    assert "bert.encoder.layer.0.intermediate.dense" not in asymmetric_inputs(model)
    for name in gelu_inputs:
        frozen = frozen_activations(model)[name]["input"]
        assert not frozen["signed"]
        assert -0.18 < frozen["offset"] < 0
    assert not check_coverage(model, tokens())
    pack_octav(model)
    model.save_pretrained(tmp_path)
    loaded = BertForSequenceClassification.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        logits = model(**tokens()).logits
        assert torch.equal(loaded(**tokens()).logits, logits)
        exported = torch.export.export(loaded, (), tokens(), strict=False).module()
        assert torch.equal(exported(**tokens()).logits, logits)
    uncalibrate_octav(loaded)
    assert not asymmetric_inputs(loaded)


def test_a_frozen_grid_extends_from_the_lowest_value_to_the_mean_upper_end_of_all_calls() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 4))
    apply_octav(net, OctavConfig(asymmetric_activations=True))
    x = torch.randn(3, 20, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        hidden = [net[:2](part) for part in x]
    calibrate_octav(net, list(x), progress_bar=False)
    frozen = net[2].input_quantizer.frozen
    ends = [float(h.min()) + twins.octav_clip_twin(h - h.min(), 4, signed=False) for h in hidden]
    lowest = min(float(h.min()) for h in hidden)
    assert frozen.clips.tolist() == [pytest.approx(sum(ends) / 3 - lowest, rel=1e-5)]
    assert frozen.offset.item() == pytest.approx(lowest, rel=1e-6)
    out = net[2].input_quantizer(hidden[0])
    np.testing.assert_allclose(
        out.detach().numpy(), asymmetric_twin(hidden[0], frozen.clips.item(), frozen.offset.item(), 4), atol=1e-5
    )


@pytest.mark.parametrize("groups", [False, True])
def test_calls_without_negative_values_keep_their_upper_end(groups: bool) -> None:
    """Their clips are relative to 0, and the frozen one to the offset."""
    granularity = {"activation_granularity": {"input": "group"}, "group_size": 32} if groups else {}
    config = OctavConfig(activation_clip="max", asymmetric_activations=True, **granularity)
    net = apply_octav(nn.Sequential(nn.Linear(64, 4)), config)
    x = torch.rand(4, 2, 50, 64, generator=torch.Generator().manual_seed(0))
    x[:, :, 0, ::32] = torch.tensor([3.0, 5.0])
    x[0, :, 0, 1] = -2.0
    calibrate_octav(net, list(x), progress_bar=False)
    frozen = net[0].input_quantizer.frozen
    assert (frozen.signed, frozen.offset.item()) == (False, -2.0)
    assert frozen.clips.tolist() == [pytest.approx([5.0, 7.0]) if groups else pytest.approx(7.0)]


def test_one_call_on_the_signed_grid_decides_for_it() -> None:
    net = apply_octav(nn.Sequential(nn.Linear(8, 4)), OctavConfig(asymmetric_activations=True))
    both = torch.randn(500, 8, generator=torch.Generator().manual_seed(0))
    calibrate_octav(net, [gelu_output(20, 8), both], progress_bar=False)
    frozen = net[0].input_quantizer.frozen
    assert (frozen.signed, frozen.offset) == (True, None)
    expected = (twins.octav_clip_twin(gelu_output(20, 8), 4) + twins.octav_clip_twin(both, 4)) / 2
    assert frozen.clips.tolist() == [pytest.approx(expected, rel=1e-4)]


def test_a_convolutions_input_is_not_asymmetric() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.GELU(), nn.Conv2d(3, 2, 3, padding=1))
    plain = apply_octav(copy.deepcopy(net), OctavConfig())
    asymmetric = apply_octav(copy.deepcopy(net), OctavConfig(asymmetric_activations=True))
    x = torch.randn(2, 2, 6, 6)
    assert torch.equal(plain(x), asymmetric(x))
    with pytest.raises(ValueError, match=r"2: the input of this Conv2d cannot be asymmetric, because padding zeros"):
        apply_octav(net, OctavConfig(module_overrides={"2": {"asymmetric_activations": True}}))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"asymmetric_activations": 1}, "asymmetric_activations must be True or False, got 1"),
        ({"asymmetric_activations": True, "unsigned_activations": False}, "needs unsigned_activations=True"),
    ],
    ids=str,
)
def test_refuses_what_cannot_be(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OctavConfig(**config)


def test_says_what_it_is() -> None:
    assert "or asymmetric" in repr(quantizer())
    frozen = quantizer()
    frozen.freeze(FrozenClips(False, torch.tensor([2.0]), torch.tensor(-0.17)))
    assert "from an offset on" in repr(frozen)
