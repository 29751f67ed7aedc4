"""Fake quantization: rounding to the grid in the forward pass, a gradient estimator in the backward pass."""

from enum import StrEnum
from typing import Any

import torch
from torch import Tensor

from .grid import check_num_bits, integer_bounds, round_to_step, step_size
from .kernels.fused import elementwise, fused
from .rows import Sign, check_floating, statistics_dtype


class GradientEstimator(StrEnum):
    """The derivative of rounding and clipping that the backward pass uses; see ``fake_quantize``."""

    STE = "ste"
    PWL = "pwl"
    MAD = "mad"


def fake_quantize(x: Tensor, clip: Tensor, num_bits: int, *, signed: Sign = True, gradient: str = "mad") -> Tensor:
    """Round ``x`` to the grid of ``num_bits`` bits clipped at ``clip`` (Eq. 2 and 3; footnote 2's integer range).

    The gradient into ``x`` is the incoming one times (section 4)

    ======= =============== ======================= =====================
    name    inside the clip  outside, signed         outside, unsigned
    ======= =============== ======================= =====================
    ``ste`` 1               1                       1
    ``pwl`` 1               0                       0
    ``mad`` 1               ``clip / |x|`` (Eq. 10) ``clip / x`` above, 0 below zero
    ======= =============== ======================= =====================

    where inside means ``|x| <= clip``, or ``0 <= x <= clip`` unsigned. MAD treats clipping as the attenuation
    ``clip(x) = a x`` with constant ``a``, which is 0 for a negative value on an unsigned grid. ``clip`` gets no
    gradient: it is recomputed from the data, not learned.

    Args:
        x: float16, bfloat16, float32 or float64, any shape.
        clip: clipping scalar(s) s >= 0 in the units of ``x``, floating point, broadcastable against ``x``.
        num_bits: 2 to 8.
        signed: integers ``[-2^(B-1), 2^(B-1)-1]``, or ``[0, 2^B-1]``; or a bool tensor ``[]`` on the device of ``x`` that
            says which.
        gradient: ``"ste"``, ``"pwl"`` or ``"mad"``.

    Returns:
        Shape and dtype of ``x``, computed in float32 or better. 0 where ``clip`` is 0, NaN where ``x`` is NaN.
        For the backward pass ``ste`` saves nothing, ``pwl`` one byte per element and ``mad`` a reference to ``x``.

    Raises:
        TypeError: ``x`` or ``clip`` is not floating point.
        ValueError: ``num_bits`` or ``gradient`` is unknown; ``clip`` cannot be broadcast to ``x``, or is on
            another device (a 0-dim one may be on the CPU).
    """
    check_floating(x, "fake_quantize")
    check_floating(clip, "fake_quantize (clip)")
    check_num_bits(num_bits)
    if gradient not in GRADIENT_FUNCTIONS:
        raise ValueError(f"gradient must be one of {sorted(map(str, GradientEstimator))}, got {gradient!r}")
    trailing = x.shape[x.dim() - clip.dim() :] if clip.dim() <= x.dim() else None
    if trailing is None or any(c not in (1, n) for c, n in zip(clip.shape, trailing, strict=True)):
        raise ValueError(
            f"fake_quantize: clip of shape {tuple(clip.shape)} cannot be broadcast to x of shape {tuple(x.shape)}; "
            "compute it with the dim= that is reduced, which keeps that dimension with size 1"
        )
    if clip.device != x.device and (clip.dim() > 0 or clip.device.type != "cpu"):
        raise ValueError(
            f"fake_quantize: clip of shape {tuple(clip.shape)} is on {clip.device}, and x of shape {tuple(x.shape)} on "
            f"{x.device}; write clip.to(x.device)"
        )
    return GRADIENT_FUNCTIONS[gradient].apply(x, clip.detach(), num_bits, signed)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, clip: Tensor, num_bits: int, signed: Sign) -> Tensor:
        return _quantize(x, clip, num_bits, signed)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return grad, None, None, None


class _PiecewiseLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, clip: Tensor, num_bits: int, signed: Sign) -> Tensor:
        if not ctx.needs_input_grad[0]:
            return _quantize(x, clip, num_bits, signed)
        grid = _grid(x, clip, num_bits, signed)
        top = clip.to(grid[0].dtype)
        bottom = top * -_as_number(signed, top)
        rounded, inside = elementwise(_round_and_compare, (x,), (*grid, bottom, top))
        ctx.save_for_backward(inside)
        return rounded

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (inside,) = ctx.saved_tensors
        return elementwise(_keep, (grad, inside), ())[0], None, None, None


class _MagnitudeAware(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, clip: Tensor, num_bits: int, signed: Sign) -> Tensor:
        if ctx.needs_input_grad[0]:
            clip = clip.to(statistics_dtype(x.dtype))
            ctx.save_for_backward(x, clip, _as_number(signed, clip))
        return _quantize(x, clip, num_bits, signed)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        x, clip, signed = ctx.saved_tensors
        return elementwise(_attenuate, (grad, x), (clip, signed))[0], None, None, None


def _as_number(signed: Sign, like: Tensor) -> Tensor:
    """1 for a signed grid, 0 for an unsigned one, ``[]``; a tensor, since numbers would be compiled in as constants."""
    return signed.to(like.dtype) if isinstance(signed, Tensor) else like.new_full((), signed)


def _grid(x: Tensor, clip: Tensor, num_bits: int, signed: Sign) -> tuple[Tensor, Tensor, Tensor]:
    """Step, lowest and highest integer."""
    step = step_size(clip.to(statistics_dtype(x.dtype)), num_bits, signed)
    return step, *integer_bounds(num_bits, signed, step)


def _quantize(x: Tensor, clip: Tensor, num_bits: int, signed: Sign) -> Tensor:
    return elementwise(_round, (x,), _grid(x, clip, num_bits, signed))[0]


@fused
def _round(x: Tensor, step: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor]:
    return (round_to_step(x, step, low, high).to(x.dtype),)


@fused
def _round_and_compare(
    x: Tensor, step: Tensor, low: Tensor, high: Tensor, bottom: Tensor, top: Tensor
) -> tuple[Tensor, Tensor]:
    """``x`` on the grid, and 1 inside the clip, 0 outside, as bytes."""
    value = x.to(step.dtype)
    # By way of floats, which is vectorized; storing the comparison's result directly is not.
    inside = ((value >= bottom) & (value <= top)).to(step.dtype)
    return round_to_step(x, step, low, high).to(x.dtype), inside.to(torch.uint8)


@fused
def _keep(grad: Tensor, inside: Tensor) -> tuple[Tensor]:
    """PWL: the gradient inside the clip, 0 outside."""
    return (grad * inside.to(grad.dtype),)


@fused
def _attenuate(grad: Tensor, x: Tensor, clip: Tensor, signed: Tensor) -> tuple[Tensor]:
    """MAD: the gradient times ``clip / |x|`` outside the clip, and times ``signed``, 1 or 0, below zero."""
    # Inside, the divisor is the clip itself, so the factor is exactly 1; 0 / 0 is a zero inside a zero clip.
    factor = (clip / torch.maximum(x.to(clip.dtype).abs(), clip)).nan_to_num(nan=1.0)
    return ((torch.where(x < 0, factor * signed, factor) * grad).to(grad.dtype),)


GRADIENT_FUNCTIONS: dict[str, type[torch.autograd.Function]] = {
    GradientEstimator.STE: _StraightThrough,
    GradientEstimator.PWL: _PiecewiseLinear,
    GradientEstimator.MAD: _MagnitudeAware,
}
