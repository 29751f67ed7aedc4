"""Triton kernels for rounding and its gradients, one loop over the tensor each.

``cuda_loops.py`` calls them; ``fake_quantize.py`` explains the formulas. The arithmetic is the same: division is
correctly rounded, and launches disable fused multiply-adds.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

_TO_INTEGER = tl.constexpr(1.5 * 2.0**23)  # adding and subtracting it rounds values below 2^22, ties to even


@triton.jit
def _elements(wide: tl.constexpr, block: tl.constexpr):
    """Indices of a program's elements, 64-bit if ``wide``."""
    program = tl.program_id(0)
    if wide:
        program = program.to(tl.int64)
    return program * block + tl.arange(0, block)


@triton.jit
def _parameter_of(at, n0, n1, n2, dims: tl.constexpr, varies: tl.constexpr):
    """Index of the parameter for the element ``at``; the parameter varies along every other dimension of the tensor.

    Args:
        n0, n1, n2: sizes of the last, the second last and the third last dimension.
        dims: number of dimensions, 1 to 4.
        varies: whether the parameter varies along the last dimension.
    """
    rest = at
    place, stride = at * 0, at * 0 + 1
    if dims > 1:
        if varies:
            place, stride = rest % n0, stride * n0
        rest = rest // n0
    if dims > 2:
        if not varies:
            place, stride = place + rest % n1 * stride, stride * n1
        rest = rest // n1
    if dims > 3:
        if varies:
            place, stride = place + rest % n2 * stride, stride * n2
        rest = rest // n2
    if varies == (dims % 2 == 1):  # varies along the first dimension
        place += rest * stride
    return place


@triton.jit
def _load(x, clip, low, high, signed, offset, at, inside, n0, n1, n2, dims: tl.constexpr, varies: tl.constexpr):
    """Values minus the offset, clips, and the integer range."""
    value = tl.load(x + at, mask=inside).to(tl.float32)
    clip = tl.load(clip + _parameter_of(at, n0, n1, n2, dims, varies), mask=inside)
    if offset is not None:
        value -= tl.load(offset)
    lowest, highest = low.to(tl.float32), high.to(tl.float32)
    if signed is not None:
        is_signed = tl.load(signed) != 0
        lowest, highest = tl.where(is_signed, lowest, 0.0), tl.where(is_signed, highest, highest - lowest)
    return value, clip, lowest, highest


@triton.jit(do_not_specialize=["low", "high", "n0", "n1", "n2"])
def round_values(
    x, clip, low, high, signed, offset, result, is_inside, n0, n1, n2, numel,
    wide: tl.constexpr, block: tl.constexpr, dims: tl.constexpr, varies: tl.constexpr,
):  # fmt: skip
    """``round_to_levels``; with ``is_inside``, ``round_and_compare``."""
    at = _elements(wide, block)
    mask = at < numel
    value, clips, lowest, highest = _load(x, clip, low, high, signed, offset, at, mask, n0, n1, n2, dims, varies)
    step = clips / (highest + 1)  # a power of two
    scaled = tl.div_rn(value, tl.where(step == 0, 1.0, step))
    integer = tl.clamp(scaled, lowest, highest, propagate_nan=tl.PropagateNan.ALL) + _TO_INTEGER - _TO_INTEGER
    rounded = integer * step
    if offset is not None:
        rounded += tl.load(offset)
    tl.store(result + at, rounded.to(result.dtype.element_ty), mask=mask)
    if is_inside is not None:
        tl.store(is_inside + at, ((value >= step * lowest) & (value <= clips)).to(tl.uint8), mask=mask)


@triton.jit
def keep_inside(grad, is_inside, result, numel, wide: tl.constexpr, block: tl.constexpr):
    at = _elements(wide, block)
    mask = at < numel
    kept = tl.load(grad + at, mask=mask) * tl.load(is_inside + at, mask=mask).to(grad.dtype.element_ty)
    tl.store(result + at, kept, mask=mask)


@triton.jit(do_not_specialize=["low", "n0", "n1", "n2"])
def attenuate_outside(
    grad, x, clip, low, signed, offset, result, n0, n1, n2, numel,
    wide: tl.constexpr, block: tl.constexpr, dims: tl.constexpr, varies: tl.constexpr,
):  # fmt: skip
    at = _elements(wide, block)
    mask = at < numel
    value, clips, lowest, _ = _load(x, clip, low, low, signed, offset, at, mask, n0, n1, n2, dims, varies)
    magnitude = tl.abs(value)
    factor = tl.where(magnitude > clips, tl.div_rn(clips, tl.where(magnitude == 0, 1.0, magnitude)), 1.0)
    lowest_kept = tl.where(lowest == 0, 0.0, float("-inf"))  # an unsigned grid has no negative values
    factor = tl.where(value < lowest_kept, 0.0, factor)
    result_dtype: tl.constexpr = result.dtype.element_ty
    attenuated = factor * tl.load(grad + at, mask=mask).to(tl.float32)
    tl.store(result + at, attenuated.to(result_dtype), mask=mask)
