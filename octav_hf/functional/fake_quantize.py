"""Fake quantization: values on the grid in the forward pass, an estimator of its gradient in the backward pass."""

from typing import Any

import torch
from torch import Tensor

from .grid import check_num_bits, round_to_grid
from .rows import check_floating, statistics_dtype


def fake_quantize(x: Tensor, clip: Tensor, num_bits: int, *, signed: bool = True, gradient: str = "mad") -> Tensor:
    """Round ``x`` to the grid of ``num_bits`` bits clipped at ``clip`` (Eq. 2 and 3; footnote 2's integer range).

    The gradient into ``x`` is the incoming one times (section 4)

    ======= =============== ======================= =====================
    name    inside the clip  outside, signed         outside, unsigned
    ======= =============== ======================= =====================
    ``ste`` 1               1                       1
    ``pwl`` 1               0                       0
    ``mad`` 1               ``clip / |x|`` (Eq. 10) ``clip / x`` above, 0 below zero
    ======= =============== ======================= =====================

    where inside means ``|x| <= clip``, or ``0 <= x <= clip`` unsigned. MAD reads clipping as the attenuation
    ``clip(x) = a x`` with ``a`` held constant; a negative value on an unsigned grid has ``a = 0``. There is no gradient
    into ``clip``: it is recomputed from the data, never learned.

    Args:
        x: float16, bfloat16, float32 or float64, any shape.
        clip: clipping scalar(s) s >= 0 in the units of ``x``, floating point, broadcastable against ``x``.
        num_bits: 2 to 8.
        signed: integers ``[-2^(B-1), 2^(B-1)-1]``, or ``[0, 2^B-1]``.
        gradient: ``"ste"``, ``"pwl"`` or ``"mad"``.

    Returns:
        Shape and dtype of ``x``; the arithmetic is float32 or better. 0 where ``clip`` is 0, NaN where ``x`` is NaN.
        For the backward pass ``ste`` keeps nothing, ``pwl`` one byte an element and ``mad`` refers to ``x``.

    Raises:
        TypeError: ``x`` or ``clip`` is not floating point.
        ValueError: ``num_bits`` or ``gradient`` is unknown, or ``clip`` cannot be broadcast to the shape of ``x``.
    """
    check_floating(x, "fake_quantize")
    check_floating(clip, "fake_quantize (clip)")
    check_num_bits(num_bits)
    if gradient not in GRADIENTS:
        raise ValueError(f"gradient must be one of {sorted(GRADIENTS)}, got {gradient!r}")
    trailing = x.shape[x.dim() - clip.dim() :] if clip.dim() <= x.dim() else None
    if trailing is None or any(c not in (1, n) for c, n in zip(clip.shape, trailing, strict=True)):
        raise ValueError(
            f"fake_quantize: clip of shape {tuple(clip.shape)} cannot be broadcast to x of shape {tuple(x.shape)}; "
            "compute it with the dim= that is reduced, which keeps that dimension with size 1"
        )
    return GRADIENTS[gradient].apply(x, clip.detach(), num_bits, signed)


class _FakeQuantize(torch.autograd.Function):
    """The forward pass that all estimators share."""

    @staticmethod
    def forward(x: Tensor, clip: Tensor, num_bits: int, signed: bool) -> Tensor:
        return round_to_grid(x, clip, num_bits, signed=signed).to(x.dtype)


class _StraightThrough(_FakeQuantize):
    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return grad, None, None, None


class _PiecewiseLinear(_FakeQuantize):
    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, clip, _, signed = inputs
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(_inside(x, clip, signed))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (inside,) = ctx.saved_tensors
        return grad * inside, None, None, None


class _MagnitudeAware(_FakeQuantize):
    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, clip, _, ctx.signed = inputs
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(x, clip)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        x, clip = ctx.saved_tensors
        # Inside, the divisor is the clip itself and the factor exactly 1; 0 / 0 is a zero inside a clip of zero.
        divisor = torch.maximum(x.to(statistics_dtype(x.dtype)).abs(), clip)
        factor = (clip / divisor).nan_to_num_(nan=1.0)
        if not ctx.signed:
            factor.masked_fill_(x < 0, 0)
        return factor.mul_(grad).to(grad.dtype), None, None, None


def _inside(x: Tensor, clip: Tensor, signed: bool) -> Tensor:
    """Whether each value is representable up to rounding."""
    x = x.to(statistics_dtype(x.dtype))
    return x.abs() <= clip if signed else (x >= 0) & (x <= clip)


GRADIENTS: dict[str, type[_FakeQuantize]] = {
    "ste": _StraightThrough,
    "pwl": _PiecewiseLinear,
    "mad": _MagnitudeAware,
}
