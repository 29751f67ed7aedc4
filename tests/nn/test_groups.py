"""Group clips: each is computed from the elements of its group, and each group's product is scaled separately."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from octav_hf.coverage.operand_watch import on_grid
from octav_hf.functional import CLIP_RULES, fake_quantize, register_clip_rule
from octav_hf.functional.groups import Groups
from octav_hf.integrations.transformers_conv1d import QuantizedTransformersConv1D
from octav_hf.nn import (
    ATTENTION_OPERANDS,
    AttentionMatmuls,
    ClipObserver,
    FakeQuantize,
    FrozenClips,
    HistogramObserver,
    MeanObserver,
    PackedWeight,
    QuantizedLinear,
    WeightFakeQuantize,
)

from ..test_memory import kept_bytes
from ..twins import (
    as_float64,
    best_sweep_mse,
    gradient_twin,
    max_clip_twin,
    mse_twin,
    octav_clip_twin,
    percentile_clip_twin,
    quantize_twin,
)
from .attention.test_module import SPELLINGS, operands

Tensor = torch.Tensor

LENGTHS = [8, 10, 3]  # in groups of 4: even, a shorter last group, nothing but that
TWINS: dict[str, Callable[..., float]] = {
    "octav": lambda x, signed: octav_clip_twin(x, 4, signed),
    "max": max_clip_twin,
    "percentile": lambda x, signed: percentile_clip_twin(x, 70.0, signed),
    "mean": lambda x, signed: float(np.abs(x).mean()),
}
OPTIONS = {"percentile": {"percentile": 70.0}}


@pytest.fixture(autouse=True)
def _rule_of_a_user() -> Iterator[None]:
    """A rule that depends on zeros, such as those of padding."""

    @register_clip_rule("mean")
    def mean_clip(x: Tensor, num_bits: int, *, signed: bool = True, dim: object = None) -> Tensor:
        return x.abs().mean(dim=dim, keepdim=dim is not None)

    yield
    del CLIP_RULES["mean"]


def data(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Values with a different magnitude in each group."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (x * torch.linspace(1, 5, x.numel(), dtype=torch.float64).reshape(shape)).to(dtype)


def slices(length: int, size: int) -> list[slice]:
    return [slice(begin, min(begin + size, length)) for begin in range(0, length, size)]


def group_twin(x: Tensor, size: int, clip_of: Callable[..., float], signed: bool = True) -> np.ndarray:
    """The clips along the last dimension, in float64, one group after the other: `[..., groups, 1]`."""
    values = as_float64(x)
    groups = slices(values.shape[-1], size)
    clips = np.empty((*values.shape[:-1], len(groups), 1))
    for place in np.ndindex(values.shape[:-1]):
        for number, group in enumerate(groups):
            clips[(*place, number, 0)] = clip_of(values[(*place, group)], signed)
    return clips


def of_elements(clips: np.ndarray, length: int, size: int) -> np.ndarray:
    return np.repeat(clips[..., 0], size, axis=-1)[..., :length]


@pytest.mark.parametrize("gradient", ["ste", "pwl", "mad"])
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("rule", TWINS)
@pytest.mark.parametrize("length", LENGTHS)
def test_each_group_is_quantized_as_if_it_were_alone(length: int, rule: str, signed: bool, gradient: str) -> None:
    x = data(3, 2, length).requires_grad_()
    options = OPTIONS.get(rule, {})
    settings = {"clip": rule, "clip_options": options, "gradient_estimator": gradient, "signed": signed}
    quantizer = FakeQuantize(4, dim=(-1,), group_size=4, **settings)
    clips = quantizer.compute_clip(x.detach())
    expected = group_twin(x, 4, TWINS[rule], signed)
    assert clips.shape == expected.shape == (3, 2, -(-length // 4), 1)
    np.testing.assert_allclose(clips.numpy(), expected, rtol=1e-6)
    spread = of_elements(clips.numpy(), length, 4)
    output = quantizer(x)
    np.testing.assert_allclose(output.detach().numpy(), quantize_twin(x, spread, 4, signed), rtol=1e-6, atol=1e-7)
    incoming = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    output.backward(incoming)
    wanted = as_float64(incoming) * gradient_twin(x, spread, signed, gradient)
    np.testing.assert_allclose(x.grad.numpy(), wanted, rtol=1e-6, atol=1e-7)
    assert on_grid(output.detach(), quantizer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("length", [128, 100])
def test_the_kernels_for_large_tensors_agree(length: int, dtype: torch.dtype) -> None:
    """A transposed tensor too, as attention has it."""
    x = data(length, 9, 60, dtype=dtype).permute(2, 1, 0)
    for clip in ("octav", "mse"):
        quantizer = FakeQuantize(4, clip=clip, dim=(-1,), group_size=32)
        output = quantizer(x)
        parts = [quantizer(x[..., group].contiguous()) for group in slices(length, 32)]
        # Of a small tensor a clip by Eq. 6 is exact, of a large one within 1e-6.
        difference = (output - torch.cat(parts, dim=-1)).float().abs()
        assert (difference > 1e-2 * output.float().abs()).double().mean() < 1e-3
        assert output.shape == x.shape
        assert output.dtype == dtype


@pytest.mark.parametrize("length", [128, 100])
def test_the_clip_with_the_lowest_error_is_found_for_each_group(length: int) -> None:
    x = data(40, length)
    clips = FakeQuantize(4, clip="mse", dim=(-1,), group_size=32).compute_clip(x)
    for number, group in enumerate(slices(length, 32)):
        error = sum(mse_twin(row[group], float(clip[number]), 4) for row, clip in zip(x, clips, strict=True))
        best = sum(best_sweep_mse(row[group], 4, points=200) for row in x)
        assert error <= (1.06 if group.stop - group.start == 32 else 1.5) * best


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("rule", ["octav", "max"])
def test_an_asymmetric_grid_has_one_offset(length: int, rule: str) -> None:
    x = F.gelu(data(6, length))
    quantizer = FakeQuantize(4, clip=rule, signed=None, asymmetric=True, dim=(-1,), group_size=4)
    grid = quantizer.dynamic_grid(x)
    low = float(x.min())
    assert float(grid.offset) == pytest.approx(low, rel=1e-6)
    assert not bool(grid.signed)
    expected = group_twin(x.double() - grid.offset.double(), 4, TWINS[rule], signed=False)
    np.testing.assert_allclose(grid.clip.numpy(), expected, rtol=1e-5)
    spread = of_elements(grid.clip.numpy(), length, 4)
    wanted = as_float64(grid.offset) + quantize_twin(x - grid.offset, spread, 4, signed=False)
    np.testing.assert_allclose(quantizer(x).numpy(), wanted, rtol=1e-5, atol=1e-6)


def test_of_nothing() -> None:
    for shape in ((0, 8), (3, 0), (0, 5)):
        assert FakeQuantize(4, dim=(-1,), group_size=4)(torch.empty(shape)).shape == shape


def test_clips_that_are_not_of_the_groups_are_an_error() -> None:
    x = data(3, 10)
    with pytest.raises(ValueError, match=r"clip of shape \(3, 2, 1\) cannot be broadcast to x of shape \(3, 3, 4\)"):
        fake_quantize(x, torch.ones(3, 2, 1), 4, groups=Groups(4, -1))


def test_a_weight_is_cut_along_what_is_summed_over() -> None:
    weight = data(10, 5)  # of Conv1D, [in, out]
    along_first, along_last = (WeightFakeQuantize(4, dim=(dim,), group_size=4) for dim in (0, 1))
    assert along_first.compute_clip(weight).shape == (3, 1, 5)
    assert torch.equal(along_first(weight).t(), along_last(weight.t().contiguous()))
    along_first.freeze_at(weight)
    assert along_first.frozen_problem(along_first.frozen, (10, 5), 1) == ""
    assert "needs signed clips of shape (3, 1, 6)" in along_first.frozen_problem(along_first.frozen, (10, 6), 1)


# Products


def integers_and_steps(x: Tensor, size: int, signed: bool) -> tuple[np.ndarray, np.ndarray]:
    """Levels of `[..., n]` and the steps of its groups, `[..., groups]`."""
    clips = group_twin(x, size, TWINS["octav"], signed).astype(np.float32)
    steps = clips[..., 0] / (8 if signed else 16)
    levels = quantize_twin(x, of_elements(clips, x.shape[-1], size), 4, signed)
    spread = np.repeat(steps, size, axis=-1)[..., : x.shape[-1]]
    return np.round(levels / np.where(spread > 0, spread, 1)).astype(np.int64), steps


def product_of_groups(left: Tensor, right: Tensor, size: int, signed: bool = True) -> np.ndarray:
    """`left @ right.mT`: an integer matmul per group, scaled separately, and added up."""
    (k, alpha), (q, beta) = integers_and_steps(left, size, signed), integers_and_steps(right, size, True)
    result = np.zeros(())
    for number, group in enumerate(slices(left.shape[-1], size)):
        scale = alpha[..., number, None] * beta[..., None, :, number]
        result = result + (k[..., group] @ q[..., group].swapaxes(-1, -2)) * scale
    return result


@pytest.mark.parametrize("attention", SPELLINGS)
def test_attention_is_sums_of_scaled_integer_products(attention: Callable) -> None:
    """Of 8 channels in groups of 3, and of 6 keys in groups of 4."""
    query, key, value = operands()
    sizes = {"query": 3, "key": 3, "probabilities": 4, "value": 4}
    modules = nn.ModuleDict(
        {
            name: FakeQuantize(4, signed=name != "probabilities", dim=(-1,), group_size=sizes[name])
            for name in ATTENTION_OPERANDS
        }
    )
    with AttentionMatmuls(modules, "layer") as matmuls:
        output = attention(query, key, value)
    matmuls.check_complete()
    scores = product_of_groups(query, key, 3) / math.sqrt(query.shape[-1])
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    probabilities = torch.from_numpy(weights / weights.sum(-1, keepdims=True)).float()
    expected = product_of_groups(probabilities, value.mT.contiguous(), 4, signed=False)
    np.testing.assert_allclose(output.numpy(), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("kind", ["linear", "Conv1D"])
def test_a_layer_is_a_sum_of_scaled_integer_products(kind: str, length: int) -> None:
    weight, x = data(5, length), data(2, 3, length, seed=1)
    operand = FakeQuantize(4, dim=(-1,), group_size=4)
    if kind == "linear":
        layer = nn.Linear(length, 5, bias=False)
        layer.weight.data.copy_(weight)
        QuantizedLinear.convert(layer, {"weight": WeightFakeQuantize(4, dim=(1,), group_size=4), "input": operand})
    else:
        layer = Conv1D(5, length)
        layer.weight.data.copy_(weight.t())
        quantizers = {"weight": WeightFakeQuantize(4, dim=(0,), group_size=4), "input": operand}
        QuantizedTransformersConv1D.convert(layer, quantizers)
    expected = product_of_groups(x, weight, 4)
    np.testing.assert_allclose(layer(x).detach().numpy(), expected, rtol=1e-5, atol=1e-5)


# Static clips


def static(**settings: object) -> FakeQuantize:
    """The quantizer of a linear layer's input."""
    return FakeQuantize(4, dim=(-1,), group_size=4, frozen_group_size=4, name="layer input", **settings)


def observed(quantizer: FakeQuantize, observer_class: type[ClipObserver], *calls: Tensor) -> FrozenClips:
    observer = quantizer.observer = observer_class(quantizer)
    for _ in range(2):
        for x in calls:
            quantizer(x)
        if not observer.needs_another_pass():
            break
    del quantizer.observer
    frozen = observer.frozen()
    quantizer.freeze(frozen)
    return frozen


def clips_over_tokens(x: Tensor, signed: bool = True) -> np.ndarray:
    """`[groups]`."""
    groups = slices(x.shape[-1], 4)
    return np.array([octav_clip_twin(as_float64(x)[..., group], 4, signed) for group in groups])


@pytest.mark.parametrize("length", LENGTHS)
def test_a_frozen_clip_of_an_input_is_for_all_tokens(length: int) -> None:
    """The mean over samples and calls, or the clip of all values."""
    calls = [data(tokens, 2, length, seed=tokens) for tokens in (3, 5)]
    quantizer = static()
    frozen = observed(quantizer, MeanObserver, *calls)
    expected = np.mean([clips_over_tokens(x) for x in [*calls[0], *calls[1]]], axis=0)
    np.testing.assert_allclose(frozen.clips.numpy(), expected[None], rtol=1e-6)
    pooled = observed(static(), HistogramObserver, *calls)
    both = torch.cat([x.flatten(0, -2) for x in calls])
    np.testing.assert_allclose(pooled.clips.numpy(), clips_over_tokens(both)[None], rtol=2e-4)
    assert quantizer.parts_of(calls[0]) == expected.shape
    spread = of_elements(frozen.clips.numpy()[..., None], length, 4)
    np.testing.assert_allclose(quantizer(calls[0]).numpy(), quantize_twin(calls[0], spread, 4), rtol=1e-5)
    assert quantizer.frozen_problem(frozen, (), 1) == ""
    assert quantizer.frozen_problem(FrozenClips(True, torch.ones(1, 2, 2)), (), 1)


@pytest.mark.parametrize("observer_class", [MeanObserver, HistogramObserver])
def test_a_frozen_asymmetric_grid_begins_at_the_lowest_value(observer_class: type[ClipObserver]) -> None:
    calls = [F.gelu(data(5, 10, seed=seed)) for seed in range(2)]
    frozen = observed(static(signed=None, asymmetric=True), observer_class, *calls)
    assert float(frozen.offset) == pytest.approx(min(float(x.min()) for x in calls))
    assert not frozen.signed
    assert frozen.clips.shape == (1, 3)


def test_an_input_of_another_width_is_an_error() -> None:
    quantizer = static()
    observed(quantizer, MeanObserver, data(3, 10))
    with pytest.raises(ValueError, match=r"layer input: its frozen clips have the shape \(3,\), .* needs .*\(4,\)"):
        quantizer(data(3, 13))


def test_a_number_is_for_all_groups() -> None:
    quantizer = static()
    quantizer.freeze(FrozenClips(True, torch.tensor([2.0])))
    assert quantizer.is_static
    assert not quantizer.is_granular
    x = data(3, 10)
    assert torch.equal(quantizer(x), fake_quantize(x, torch.tensor(2.0), 4))


# Packed, and what is kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("length", LENGTHS)
def test_packed_it_is_the_same_bit_for_bit(length: int, dim: int, bits: int, dtype: torch.dtype) -> None:
    weight = data(5, length, dtype=dtype)
    weight[1] = 0
    weight = weight if dim == 1 else weight.t().contiguous()
    quantizer = WeightFakeQuantize(bits, dim=(dim,), group_size=4, name="layer weight")
    packed = PackedWeight.pack(quantizer, weight)
    assert packed.scale.shape == (5, -(-length // 4))
    assert torch.equal(packed.dequantize(), quantizer(weight))
    assert torch.equal(packed.compute_clip(weight), quantizer.compute_clip(weight))
    rows = packed.integers() if dim == 1 else packed.integers().t()
    scale = packed.scale.repeat_interleave(4, dim=1)[:, :length]
    assert torch.equal((rows * scale).to(dtype), quantizer(weight) if dim == 1 else quantizer(weight).t())


@pytest.mark.parametrize("length", [64, 50])
@pytest.mark.parametrize(("gradient", "bytes_each"), [("ste", 0), ("pwl", 1), ("mad", 4)])
def test_nothing_more_is_kept_for_the_backward_pass(gradient: str, bytes_each: int, length: int) -> None:
    x = data(40, length).requires_grad_()
    quantizer = FakeQuantize(4, gradient_estimator=gradient, dim=(-1,), group_size=32)
    clips = 4 * 40 * 2
    assert kept_bytes(lambda: quantizer(x).sum(), quantizer) <= x.numel() * bytes_each + clips + 16


@pytest.mark.parametrize(("dim", "gradient"), [(-1, "mad"), (-2, "pwl")])
def test_a_compiled_quantizer_serves_lengths_below_and_above_a_group(dim: int, gradient: str) -> None:
    """Compiled by Inductor, whose code once read out of bounds where the length was below the group size."""
    quantizer = FakeQuantize(4, clip="max", dim=(dim,), group_size=32, gradient_estimator=gradient)
    torch._dynamo.reset()
    compiled = torch.compile(quantizer, dynamic=True, fullgraph=True)
    for length in (10, 31, 33, 77):
        x = data(3, length, 5).requires_grad_() if dim == -2 else data(3, 5, length).requires_grad_()
        results = []
        for each in (compiled, quantizer):
            y = each(x)
            (grad,) = torch.autograd.grad((y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum(), x)
            results.append((y.detach(), grad))
        for got, expected in zip(*results, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
