"""Fake quantization with a learned clip, which gets the gradient of LSQ."""

from typing import Any

import torch
from torch import Tensor

from .fake_quantize import GradientEstimator, attenuate_outside, checked_grid, difference, round_to_levels
from .grid import bounds_for_sign, integers_of
from .kernels.fused import elementwise
from .rows import Sign

# The backward pass needs one byte per element: its rounding error in units of 1/250 of a step, or one of these codes.
_BELOW, _ABOVE_HIGHEST, _ABOVE_CLIP = -128, 126, 127
_ERROR_UNITS = 250


def fake_quantize_learned_clip(
    x: Tensor,
    clip: Tensor,
    num_bits: int,
    *,
    signed: Sign = True,
    offset: Tensor | None = None,
    gradient: str = "mad",
) -> Tensor:
    """``fake_quantize`` whose ``clip`` gets the gradient of LSQ (Esser et al. 2020, arXiv 1902.08153, Eq. 3).

    Let n and p be the lowest and the highest integer, and v = (x - offset) (p + 1) / clip the element in units of the
    step. The derivative of the result with respect to the clip is

    ========= ============================
    where     d result / d clip · (p + 1)
    ========= ============================
    v < n     n
    n ≤ v ≤ p round(v) - v
    v > p     p
    ========= ============================

    The gradient of a clip is the sum of this times the incoming gradient over the elements that share the clip,
    divided by sqrt(N p), where N is the number of those elements per sample (index of the first dimension). With this
    scale, relative updates of clips are as large as those of weights (section 2.2), and the clips hardly contribute to
    the global gradient norm.

    Args:
        x, clip, num_bits, signed, offset, gradient: as in ``fake_quantize``; ``x`` gets the same gradient.

    Returns:
        The result of ``fake_quantize``, bit for bit. For the backward pass, ``ste`` and ``pwl`` save one byte per
        element (the rounding error to within 0.002 of a step), and ``mad`` saves a reference to ``x``.

    Raises:
        TypeError, ValueError: as ``fake_quantize``.
    """
    grid = checked_grid(x, clip, num_bits, signed, offset, gradient)
    in_batch_element = x.numel() // max(1, clip.numel() * (x.shape[0] if x.dim() else 1))
    return _LearnedClip.apply(x, gradient, max(1, in_batch_element), *grid)


class _LearnedClip(torch.autograd.Function):
    """Autograd function of ``fake_quantize_learned_clip``; ``grid`` is the result of ``checked_grid``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gradient: str, elements: int, *grid: Any) -> Tensor:
        ctx.gradient, ctx.elements = gradient, elements
        clip, ctx.low, ctx.high, signed, offset = grid
        ctx.shape, ctx.dtype = clip.shape, clip.dtype
        if gradient == GradientEstimator.MAD:
            ctx.save_for_backward(signed, x, clip, offset)
            return round_to_levels(x, *grid)
        rounded, place = round_and_locate(x, *grid)
        ctx.save_for_backward(signed, place)
        return rounded

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradient == GradientEstimator.MAD:
            signed, x, clip, offset = ctx.saved_tensors
            place = round_and_locate(x, clip, ctx.low, ctx.high, signed, offset)[1]
        else:
            signed, place = ctx.saved_tensors
        inside, by_element = split_gradient(grad, place, ctx.low, ctx.high, signed, ctx.dtype)
        high = bounds_for_sign(ctx.low, ctx.high, signed, ctx.dtype)[1]
        of_clip = by_element.sum_to_size(ctx.shape) * ((ctx.elements * high) ** -0.5 / (high + 1))
        if ctx.gradient == GradientEstimator.PWL:
            grad = inside
        elif ctx.gradient == GradientEstimator.MAD:
            grad = attenuate_outside(grad, x, clip, ctx.low, signed, offset)
        return grad, None, None, of_clip, *(None,) * 4


@elementwise("(Tensor x, Tensor clip, int low, int high, Tensor? signed, Tensor? offset) -> (Tensor, Tensor)")
def round_and_locate(
    x: Tensor, clip: Tensor, low: int, high: int, signed: Tensor | None, offset: Tensor | None
) -> tuple[Tensor, Tensor]:
    """``round_to_levels``, and one int8 code per element for the backward pass."""
    value, bounds = difference(x, clip, offset), bounds_for_sign(low, high, signed, clip.dtype)
    step = clip / (bounds[1] + 1)
    integers = integers_of(value, step, *bounds)
    error = (integers - value / (step + (step == 0))).clamp(-0.5, 0.5)
    place = (error * _ERROR_UNITS).round()
    place = torch.where(value > step * bounds[1], _ABOVE_HIGHEST, place)
    place = torch.where(value > clip, _ABOVE_CLIP, place)
    place = torch.where(value < step * bounds[0], _BELOW, place)
    rounded = integers * step
    return (rounded if offset is None else rounded + offset).to(x.dtype), place.to(torch.int8)


@elementwise(
    "(Tensor grad, Tensor place, int low, int high, Tensor? signed, ScalarType dtype) -> (Tensor, Tensor)", tensors=2
)
def split_gradient(
    grad: Tensor, place: Tensor, low: int, high: int, signed: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The gradient inside the clip (0 outside), and the gradient times ``d result / d clip · (p + 1)`` in ``dtype``."""
    located, bounds = place.to(dtype), bounds_for_sign(low, high, signed, dtype)
    is_below, is_above = located < _BELOW + 0.5, located > _ABOVE_HIGHEST - 0.5
    change = torch.where(is_below, bounds[0], torch.where(is_above, bounds[1], located / _ERROR_UNITS))
    is_inside = (located > _BELOW + 0.5) & (located < _ABOVE_CLIP - 0.5)
    return grad * is_inside.to(grad.dtype), grad.to(dtype) * change
