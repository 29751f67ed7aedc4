"""Hypothesis against the public functions: tensors of every shape, stride, dtype and kind of value."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from octav_hf.functional import (
    fake_quantize,
    integer_range,
    max_clip,
    mse_sweep_clip,
    octav_clip,
    percentile_clip,
    quantization_error,
    register_clip_rule,
    registry,
    round_to_grid,
    step_size,
)
from octav_hf.functional.bit_packing import pack_bits, packed_row_bytes, unpack_bits
from octav_hf.functional.rows import statistics_dtype, to_rows
from tests import twins

from .conftest import any_path, both_roundings

CASES = 150
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# The fixture of the paths is one for all examples of a test, and may be.
fuzz = settings(
    max_examples=CASES,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
bits = st.integers(2, 8)
signs = st.booleans()


@dataclass(frozen=True)
class Sample:
    """A tensor, and the dimension(s) that share a clip in it."""

    x: torch.Tensor
    dim: int | tuple[int, ...] | None

    def rows(self) -> list[torch.Tensor]:
        """The elements of each clip, in the order of the clips."""
        return list(to_rows(self.x, self.dim)[0])


def _values(kind: str, count: int, generator: np.random.Generator, dtype: torch.dtype) -> torch.Tensor:
    if kind == "zeros":
        values = np.zeros(count)
    elif kind == "constant":
        values = np.full(count, generator.normal())
    elif kind == "few":
        values = generator.choice([-3.0, 0.0, 0.5, 2.0, 7.0], count)
    elif kind == "no negatives":
        values = np.maximum(generator.normal(size=count), 0)
    elif kind == "outlier":
        values = generator.normal(size=count)
        values[generator.integers(count) if count else []] = 1000.0
    else:
        values = generator.standard_t(3, count)
    x = torch.from_numpy(values).to(dtype)
    limits = torch.finfo(dtype)
    if kind == "tiny":
        x = (x * limits.smallest_normal / 16).to(dtype)
    elif kind == "huge":
        x = (x / max(1.0, x.abs().max().item() if count else 1.0) * (limits.max / 4)).to(dtype)
    return x


@st.composite
def tensors(
    draw: st.DrawFn,
    kinds: tuple[str, ...] = ("heavy", "zeros", "constant", "few", "no negatives", "outlier", "tiny", "huge"),
) -> Sample:
    """Tensors with 0 to 4 dimensions of size 0 to 9, all dtypes, contiguous, transposed, sliced or expanded."""
    shape = draw(st.lists(st.integers(0, 9), max_size=4).map(tuple))
    dtype = draw(st.sampled_from(DTYPES))
    layout = draw(st.sampled_from(["whole", "transposed", "sliced", "expanded"]))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    stored = tuple(2 * size for size in shape) if layout == "sliced" else shape
    x = _values(draw(st.sampled_from(kinds)), math.prod(stored), generator, dtype).reshape(stored)
    if layout == "sliced":
        x = x[tuple(slice(0, None, 2) for _ in shape)]
    elif layout == "transposed" and len(shape) > 1:
        order = list(generator.permutation(len(shape)))
        x = x.permute(order).contiguous().permute(list(np.argsort(order)))
    elif layout == "expanded" and len(shape) > 0 and shape[0] > 0:
        x = x[:1].expand(shape)
    dims = st.lists(
        st.integers(-len(shape), len(shape) - 1), min_size=1, max_size=2, unique_by=lambda d: d % len(shape)
    )
    dim = draw(st.none() | dims.map(tuple)) if shape else None
    return Sample(x, dim)


def check_shape(clip: torch.Tensor, sample: Sample) -> None:
    assert clip.dtype == statistics_dtype(sample.x.dtype)
    assert torch.broadcast_shapes(clip.shape, sample.x.shape) == sample.x.shape or sample.x.numel() == 0
    assert clip.numel() == len(sample.rows())
    assert torch.isfinite(clip).all()
    assert (clip >= 0).all()


@fuzz
@given(tensors(), bits, signs)
def test_octav_clip_equals_the_twin(sample: Sample, num_bits: int, signed: bool) -> None:
    clip = octav_clip(sample.x, num_bits, signed=signed, dim=sample.dim)
    check_shape(clip, sample)
    for got, row in zip(clip.flatten().tolist(), sample.rows(), strict=True):
        expected = twins.octav_clip_twin(row, num_bits, signed)
        if got != pytest.approx(expected, rel=2e-5, abs=1e-44):
            # Where Eq. 6 alternates between two clips of nearly the same error, rounding decides.
            error = twins.mse_twin(row, got, num_bits, signed)
            assert error == pytest.approx(twins.mse_twin(row, expected, num_bits, signed), rel=1e-4)


OTHER_RULES: dict[str, tuple[Callable[..., torch.Tensor], Callable[..., float]]] = {
    "max": (max_clip, lambda row, num_bits, signed: twins.max_clip_twin(row, signed)),
    "percentile": (
        lambda x, num_bits, **options: percentile_clip(x, num_bits, percentile=90.0, **options),
        lambda row, num_bits, signed: twins.percentile_clip_twin(row, 90.0, signed),
    ),
}


@any_path
@pytest.mark.parametrize("rule", OTHER_RULES)
@fuzz
@given(tensors(), bits, signs)
def test_max_and_percentile_equal_the_twins(rule: str, sample: Sample, num_bits: int, signed: bool) -> None:
    function, twin = OTHER_RULES[rule]
    clip = function(sample.x, num_bits, signed=signed, dim=sample.dim)
    check_shape(clip, sample)
    for got, row in zip(clip.flatten().tolist(), sample.rows(), strict=True):
        assert got == pytest.approx(twin(row, num_bits, signed), rel=1e-6, abs=1e-44)


@any_path
@settings(parent=fuzz, max_examples=50)
@given(tensors(kinds=("heavy", "few", "outlier", "zeros")), bits, signs)
def test_no_clip_of_the_sweep_is_better_than_the_one_it_gives(sample: Sample, num_bits: int, signed: bool) -> None:
    clip = mse_sweep_clip(sample.x, num_bits, signed=signed, dim=sample.dim)
    check_shape(clip, sample)
    for got, row in zip(clip.flatten().tolist(), sample.rows(), strict=True):
        expected = twins.mse_sweep_clip_twin(row, num_bits, signed)
        error = twins.mse_twin(row, got, num_bits, signed)
        assert error <= twins.mse_twin(row, expected, num_bits, signed) * (1 + 1e-4) + 1e-30


@pytest.mark.parametrize(
    "rule", [octav_clip, max_clip, percentile_clip, mse_sweep_clip], ids=lambda rule: rule.__name__
)
@settings(parent=fuzz, max_examples=60)
@given(tensors(kinds=("heavy", "zeros", "few")), bits, signs, st.sampled_from([math.nan, math.inf, -math.inf]))
def test_a_value_that_is_not_finite_is_refused(
    rule: Callable[..., torch.Tensor], sample: Sample, num_bits: int, signed: bool, value: float
) -> None:
    x = sample.x.clone(memory_format=torch.contiguous_format)
    if x.numel() == 0:
        return
    x.view(-1)[x.numel() // 2] = value
    with pytest.raises(ValueError, match=r"1 NaN and 0 Inf|0 NaN and 1 Inf"):
        rule(x, num_bits, signed=signed, dim=sample.dim)


@fuzz
@given(tensors(kinds=("heavy", "few", "outlier", "no negatives")), bits, signs, st.integers(-8, 8))
def test_scaling_by_a_power_of_two_scales_the_clip_and_exactly_the_levels(
    sample: Sample, num_bits: int, signed: bool, exponent: int
) -> None:
    x, factor = sample.x.float(), 2.0**exponent
    clip = octav_clip(x, num_bits, signed=signed, dim=sample.dim)
    scaled = octav_clip(x * factor, num_bits, signed=signed, dim=sample.dim)
    torch.testing.assert_close(scaled, clip * factor, rtol=1e-6, atol=0)
    levels = round_to_grid(x, clip, num_bits, signed=signed)
    assert torch.equal(round_to_grid(x * factor, clip * factor, num_bits, signed=signed), levels * factor)


@fuzz
@given(tensors(), bits, signs, st.randoms(use_true_random=False))
def test_rows_do_not_depend_on_each_other_nor_on_order(
    sample: Sample, num_bits: int, signed: bool, random: object
) -> None:
    if sample.dim is None:
        return
    together = octav_clip(sample.x, num_bits, signed=signed, dim=sample.dim).flatten()
    generator = torch.Generator().manual_seed(random.randint(0, 2**31))  # type: ignore[attr-defined]
    for row, clip in zip(sample.rows(), together, strict=True):
        shuffled = row[torch.randperm(row.numel(), generator=generator)]
        alone = octav_clip(shuffled, num_bits, signed=signed)
        if alone.item() != pytest.approx(clip.item(), rel=2e-5, abs=1e-44):  # it alternates, see above
            error = twins.mse_twin(row, alone.item(), num_bits, signed)
            assert error == pytest.approx(twins.mse_twin(row, clip.item(), num_bits, signed), rel=1e-4)


@any_path
@fuzz
@given(tensors(), bits, signs)
def test_rounding_equals_the_twin_and_keeps_the_laws_of_a_grid(sample: Sample, num_bits: int, signed: bool) -> None:
    clip = octav_clip(sample.x, num_bits, signed=signed, dim=sample.dim)
    rounded = round_to_grid(sample.x, clip, num_bits, signed=signed)
    assert rounded.shape == sample.x.shape
    assert rounded.dtype == statistics_dtype(sample.x.dtype)
    assert torch.equal(round_to_grid(rounded, clip, num_bits, signed=signed), rounded)  # idempotent
    low, high = integer_range(num_bits, signed)
    # A tensor as one row is in the order of memory, which is not the same for an expanded one and its copy.
    rows, rounded_rows = (to_rows(x.contiguous(), sample.dim)[0] for x in (sample.x, rounded))
    for row, values, one in zip(rows, rounded_rows, clip.flatten(), strict=True):
        step = step_size(one, num_bits, signed)
        assert values.unique().numel() <= 2**num_bits
        assert (values >= low * step).all()
        assert (values <= high * step).all()
        order = row.double().argsort()
        assert (values[order].diff() >= 0).all()  # monotone
        if step > torch.finfo(step.dtype).smallest_normal and row.numel():
            # A quotient that lies on a midpoint to within rounding may go to either side.
            far = torch.from_numpy(twins.midpoint_distance_twin(row, one.item(), num_bits, signed)) > 1e-4
            expected = torch.from_numpy(twins.quantize_twin(row, one.item(), num_bits, signed))
            torch.testing.assert_close(values.double()[far], expected[far], rtol=1e-6, atol=0)


@both_roundings
@pytest.mark.parametrize("gradient", ["ste", "pwl", "mad"])
@fuzz
@given(tensors(), bits, signs)
def test_fake_quantization_rounds_and_passes_its_gradient(
    gradient: str, sample: Sample, num_bits: int, signed: bool
) -> None:
    clip = max_clip(sample.x, num_bits, signed=signed, dim=sample.dim) / 2
    x = sample.x.detach().requires_grad_()
    output = fake_quantize(x, clip, num_bits, signed=signed, gradient=gradient)
    assert (output.shape, output.dtype) == (x.shape, x.dtype)
    assert torch.equal(output, round_to_grid(sample.x, clip, num_bits, signed=signed).to(x.dtype))
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x.dtype)
    output.backward(upstream)
    wide = clip.expand(sample.x.shape) if sample.x.numel() else clip.new_empty(sample.x.shape)
    expected = torch.from_numpy(twins.gradient_twin(sample.x, wide, signed, gradient)).reshape(x.shape) * upstream
    tolerance = {torch.float16: 1e-3, torch.bfloat16: 1e-2}.get(x.dtype, 1e-6)
    # Below the smallest normal number a quotient of magnitudes is not exact.
    normal = (sample.x == 0) | (sample.x.abs() >= torch.finfo(x.dtype).smallest_normal)
    torch.testing.assert_close(x.grad.double()[normal], expected[normal], rtol=tolerance, atol=0)


@any_path
@fuzz
@given(tensors(kinds=("heavy", "few", "outlier", "no negatives", "constant", "zeros")), bits, signs)
def test_the_measured_error_is_the_twins(sample: Sample, num_bits: int, signed: bool) -> None:
    x = sample.x.double()
    clip = max_clip(x, num_bits, signed=signed, dim=sample.dim) / 3
    errors = quantization_error(x, clip, num_bits, signed=signed, dim=sample.dim).flatten().tolist()
    rows = to_rows(x, sample.dim)[0]
    for got, row, one in zip(errors, rows, clip.flatten().tolist(), strict=True):
        peak = row.abs().max().item() if row.numel() else 0.0
        expected = twins.mse_twin(row, one, num_bits, signed) / peak**2 if peak else 0.0
        assert got == pytest.approx(expected, rel=1e-9, abs=1e-15)


def modelled_error(row: torch.Tensor, clip: float, num_bits: int, signed: bool) -> float:
    """Eq. 4's J, whose fixed point Eq. 6 is, in float64, over the magnitudes that are not zero."""
    magnitudes = twins.octav_magnitudes(row, signed)
    inside = magnitudes <= clip
    noise = twins.octav_noise_factor(num_bits, signed) * clip**2 * inside.sum()
    return float(noise + ((magnitudes[~inside] - clip) ** 2).sum())


@fuzz
@given(tensors(kinds=("heavy", "no negatives")), bits, signs)
def test_max_scaling_is_an_upper_bound_of_the_modelled_error(sample: Sample, num_bits: int, signed: bool) -> None:
    """In the error that Eq. 4 models, OCTAV's clip is no worse than the largest magnitude, wherever Eq. 6 settles.

    The measured error of a few values is another matter: at the clip of max-scaling they can lie on the grid exactly.
    """
    clip = octav_clip(sample.x, num_bits, signed=signed, dim=sample.dim)
    for row, one in zip(sample.rows(), clip.flatten().tolist(), strict=True):
        magnitudes = twins.octav_magnitudes(row, signed)
        factor = twins.octav_noise_factor(num_bits, signed)
        if magnitudes.size == 0 or twins.octav_update(magnitudes, one, factor) != pytest.approx(one, rel=1e-4):
            continue  # nothing there, or Eq. 6 alternates and has no fixed point
        largest = modelled_error(row, float(magnitudes.max()), num_bits, signed)
        assert modelled_error(row, one, num_bits, signed) <= largest * (1 + 1e-4)


@any_path
@fuzz
@given(bits, st.integers(0, 5), st.integers(0, 40), st.integers(0, 2**32 - 1))
def test_packed_integers_come_back(num_bits: int, rows: int, length: int, seed: int) -> None:
    low, high = integer_range(num_bits, signed=True)
    generator = torch.Generator().manual_seed(seed)
    levels = torch.randint(low, high + 1, (rows, length), dtype=torch.int8, generator=generator)
    packed = pack_bits(levels, num_bits)
    assert packed.shape == (rows, packed_row_bytes(length, num_bits))
    assert torch.equal(unpack_bits(packed, num_bits, length), levels)


@any_path
def test_a_registered_rule_is_known_by_its_name_and_no_name_is_taken_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "CLIP_RULES", dict(registry.CLIP_RULES))

    @register_clip_rule("mine")
    def mine(x: torch.Tensor, num_bits: int, *, signed: bool = True, dim: object = None) -> torch.Tensor:
        return torch.ones(())

    assert registry.CLIP_RULES["mine"] is mine
    with pytest.raises(ValueError, match="a clipping rule named 'mine' is already registered"):
        register_clip_rule("mine")(mine)
