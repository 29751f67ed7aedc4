"""Fake quantization: round to the grid in the forward pass, use a gradient estimator in the backward pass."""

from enum import StrEnum
from typing import Any

import torch
from torch import Tensor

from .grid import bounds_for_sign, check_num_bits, integers_of, range_and_sign, round_to_step
from .groups import Groups
from .kernels.codes import round_to_codes as codes_in_cpp
from .kernels.fused import elementwise
from .rows import Sign, check_floating, statistics_dtype


class GradientEstimator(StrEnum):
    """The derivative of rounding and clipping that the backward pass uses; see ``fake_quantize``."""

    STE = "ste"
    PWL = "pwl"
    MAD = "mad"


_GRADIENTS = tuple(map(str, GradientEstimator))


def fake_quantize(
    x: Tensor,
    clip: Tensor,
    num_bits: int,
    *,
    signed: Sign = True,
    offset: Tensor | None = None,
    gradient: str = "mad",
    groups: Groups | None = None,
) -> Tensor:
    """Quantize and dequantize ``x`` with ``num_bits`` bits and the clip ``clip`` (Eq. 2 and 3, footnote 2).

    The gradient of ``x`` is the incoming gradient times the factor (section 4)

    ======= =============== ======================= =====================
    name    inside the clip  outside, signed         outside, unsigned
    ======= =============== ======================= =====================
    ``ste`` 1               1                       1
    ``pwl`` 1               0                       0
    ``mad`` 1               ``clip / |x|`` (Eq. 10) ``clip / x`` above, 0 below zero
    ======= =============== ======================= =====================

    where inside means ``|x| <= clip``, or ``0 <= x <= clip`` unsigned. MAD treats clipping as the attenuation
    ``clip(x) = a x`` with constant ``a``, which is 0 for a negative value on an unsigned grid. ``clip`` gets no
    gradient, because it is computed from the data and not learned.

    Args:
        x: float16, bfloat16, float32 or float64, any shape.
        clip: clipping scalar(s) s >= 0 in the units of ``x``, floating point, broadcastable against ``x``.
        num_bits: 2 to 8.
        signed: ``True`` for the integers ``[-2^(B-1), 2^(B-1)-1]``, ``False`` for ``[0, 2^B-1]``; or a bool tensor
            ``[]`` on the device of ``x``.
        offset: zero point of an asymmetric grid in the units of ``x``, ``[]`` on the device of ``x``. The result is
            ``offset + Q(x - offset)``, and inside means ``x - offset`` is inside. It gets no gradient.
        gradient: ``"ste"``, ``"pwl"`` or ``"mad"``.
        groups: how ``x`` is split into groups; ``clip`` then has one scalar per group, as ``Groups.clips`` returns it.

    Returns:
        Same shape and dtype as ``x``, computed in float32 or better. 0 where ``clip`` is 0, NaN where ``x`` is NaN.
        For the backward pass, ``ste`` saves nothing, ``pwl`` one byte per element and ``mad`` a reference to ``x``.

    Raises:
        TypeError: ``x`` or ``clip`` is not floating point.
        ValueError: ``num_bits`` or ``gradient`` is unknown; ``clip`` cannot be broadcast to ``x``, or is on
            another device (a 0-dim clip may be on the CPU).
    """
    clip, *grid = checked_grid(x, clip, num_bits, signed, offset, gradient, groups)
    clip = clip.detach()
    if groups is None or not groups.are_even(x):
        return FakeQuantizeFunction.apply(x, gradient, groups, clip, *grid)
    (cut,) = groups.cut(x)
    return FakeQuantizeFunction.apply(cut, gradient, None, clip, *grid).reshape(x.shape)


def checked_grid(
    x: Tensor,
    clip: Tensor,
    num_bits: int,
    signed: Sign,
    offset: Tensor | None,
    gradient: str,
    groups: Groups | None = None,
) -> tuple[Tensor, int, int, Tensor | None, Tensor | None]:
    """Check the arguments of ``fake_quantize`` and return those of ``round_to_levels`` after ``x``."""
    check_floating(x, "fake_quantize")
    check_floating(clip, "fake_quantize (clip)")
    check_num_bits(num_bits)
    if gradient not in _GRADIENTS:
        raise ValueError(f"gradient must be one of {sorted(_GRADIENTS)}, got {gradient!r}")
    shape = x.shape if groups is None else groups.shape(x)
    trailing = shape[len(shape) - clip.dim() :] if clip.dim() <= len(shape) else None
    if trailing is None or any(c != 1 and c != n for c, n in zip(clip.shape, trailing, strict=True)):
        raise ValueError(
            f"fake_quantize: clip of shape {tuple(clip.shape)} cannot be broadcast to x of shape {tuple(shape)}; "
            "compute it with dim=, which keeps the reduced dimensions with size 1"
        )
    if clip.device != x.device and (clip.dim() > 0 or clip.device.type != "cpu"):
        raise ValueError(
            f"fake_quantize: clip of shape {tuple(clip.shape)} is on {clip.device}, but x of shape {tuple(x.shape)} is "
            f"on {x.device}; write clip.to(x.device)"
        )
    clip = clip.to(statistics_dtype(x.dtype))
    offset = None if offset is None else offset.detach().to(clip.dtype)
    return clip, *range_and_sign(num_bits, signed), offset


class FakeQuantizeFunction(torch.autograd.Function):
    """Autograd function of ``fake_quantize``; ``clip`` has one scalar per group if ``groups`` is not ``None``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gradient: str, groups: Groups | None, clip: Tensor, *grid: Any) -> Tensor:
        ctx.gradient, ctx.groups = gradient, groups
        of_elements = clip if groups is None else groups.of_elements(clip, x)
        if ctx.needs_input_grad[0] and gradient == GradientEstimator.PWL:
            rounded, inside = round_and_compare(x, of_elements, *grid)
            ctx.save_for_backward(inside)
            return rounded
        if ctx.needs_input_grad[0] and gradient == GradientEstimator.MAD:
            ctx.low, _, signed, offset = grid
            ctx.save_for_backward(x, clip, signed, offset)
        return round_to_levels(x, of_elements, *grid)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradient == GradientEstimator.PWL:
            grad = keep_inside(grad, *ctx.saved_tensors)
        elif ctx.gradient == GradientEstimator.MAD:
            x, clip, signed, offset = ctx.saved_tensors
            of_elements = clip if ctx.groups is None else ctx.groups.of_elements(clip, x)
            grad = attenuate_outside(grad, x, of_elements, ctx.low, signed, offset)
        return grad, *(None,) * 7


@elementwise("(Tensor x, Tensor clip, int low, int high, Tensor? signed, Tensor? offset) -> Tensor")
def round_to_levels(
    x: Tensor, clip: Tensor, low: int, high: int, signed: Tensor | None, offset: Tensor | None
) -> Tensor:
    """Round ``x`` to the grid with the integers ``low`` to ``high``, adapted to ``signed`` by ``bounds_for_sign``."""
    return _round(difference(x, clip, offset), clip, *bounds_for_sign(low, high, signed, clip.dtype), offset).to(
        x.dtype
    )


def integer_codes(
    x: Tensor, clip: Tensor, low: int, high: int, signed: Tensor | None, offset: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """``round_to_codes``, in C++ where that is supported."""
    arguments = x, clip, low, high, signed, offset, dtype
    codes = codes_in_cpp(*arguments)
    return round_to_codes(*arguments) if codes is None else codes


@elementwise("(Tensor x, Tensor clip, int low, int high, Tensor? signed, Tensor? offset, ScalarType dtype) -> Tensor")
def round_to_codes(
    x: Tensor, clip: Tensor, low: int, high: int, signed: Tensor | None, offset: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The integers of ``round_to_levels`` in ``dtype``; uint8 counts from the lowest one. NaN gives any integer."""
    bounds = bounds_for_sign(low, high, signed, clip.dtype)
    codes = integers_of(difference(x, clip, offset), clip / (bounds[1] + 1), *bounds)
    return (codes - bounds[0] if dtype == torch.uint8 else codes).to(dtype)


@elementwise("(Tensor x, Tensor clip, int low, int high, Tensor? signed, Tensor? offset) -> (Tensor, Tensor)")
def round_and_compare(
    x: Tensor, clip: Tensor, low: int, high: int, signed: Tensor | None, offset: Tensor | None
) -> tuple[Tensor, Tensor]:
    """``round_to_levels``, and a uint8 mask that is 1 inside the clip and 0 outside."""
    value, bounds = difference(x, clip, offset), bounds_for_sign(low, high, signed, clip.dtype)
    bottom = clip / (bounds[1] + 1) * bounds[0]
    # The compiler vectorizes a bool -> float -> uint8 conversion, but not bool -> uint8.
    inside = ((value >= bottom) & (value <= clip)).to(clip.dtype)
    return _round(value, clip, *bounds, offset).to(x.dtype), inside.to(torch.uint8)


@elementwise("(Tensor grad, Tensor inside) -> Tensor", tensors=2)
def keep_inside(grad: Tensor, inside: Tensor) -> Tensor:
    """PWL: keep the gradient inside the clip; 0 outside."""
    return grad * inside.to(grad.dtype)


@elementwise("(Tensor grad, Tensor x, Tensor clip, int low, Tensor? signed, Tensor? offset) -> Tensor", tensors=2)
def attenuate_outside(
    grad: Tensor, x: Tensor, clip: Tensor, low: int, signed: Tensor | None, offset: Tensor | None
) -> Tensor:
    """MAD: multiply the gradient by ``clip / |x|`` outside the clip; 0 below zero on an unsigned grid."""
    value = difference(x, clip, offset)
    # Inside, the divisor is the clip itself, so the factor is exactly 1. 0 / 0 occurs for x = 0 and clip = 0.
    factor = (clip / torch.maximum(value.abs(), clip)).nan_to_num(nan=1.0)
    if signed is not None:
        factor = torch.where((value < 0) & signed.logical_not(), 0, factor)
    elif low == 0:
        factor = torch.where(value < 0, 0, factor)
    return (factor * grad).to(grad.dtype)


def _round(value: Tensor, clip: Tensor, low: Any, high: Any, offset: Tensor | None) -> Tensor:
    """Round ``value`` to the grid with step ``clip / (high + 1)``, then add ``offset``."""
    rounded = round_to_step(value, clip / (high + 1), low, high)
    return rounded if offset is None else rounded + offset


def difference(x: Tensor, clip: Tensor, offset: Tensor | None) -> Tensor:
    """``x - offset`` in the dtype of ``clip``; in a narrower dtype the difference would lose precision."""
    value = x.to(clip.dtype)
    return value if offset is None else value - offset
