"""The quantization grid: step, integer range and rounding for a bit width and sign (Eq. 2 and 3, footnote 2)."""

from typing import Any

import torch
from torch import Tensor

from .rows import Sign, check_floating, statistics_dtype

MIN_BITS, MAX_BITS = 2, 8


def check_num_bits(num_bits: int) -> None:
    if not isinstance(num_bits, int) or isinstance(num_bits, bool) or not MIN_BITS <= num_bits <= MAX_BITS:
        raise ValueError(f"num_bits must be an integer from {MIN_BITS} to {MAX_BITS}, got {num_bits!r}")


def integer_range(num_bits: int, signed: bool) -> tuple[int, int]:
    """Lowest and highest integer: ``[-2^(B-1), 2^(B-1)-1]`` (two's complement), or ``[0, 2^B-1]`` unsigned."""
    check_num_bits(num_bits)
    return (-(2 ** (num_bits - 1)), 2 ** (num_bits - 1) - 1) if signed else (0, 2**num_bits - 1)


def step_size(clip: Tensor, num_bits: int, signed: Sign) -> Tensor:
    """Distance between two levels: ``clip / 2^(B-1)``, or ``clip / 2^B`` unsigned."""
    check_num_bits(num_bits)
    return clip * ((signed + 1) * 2.0**-num_bits)


def noise_factor(num_bits: int, signed: Sign) -> Tensor | float:
    """Rounding noise inside the clip, divided by ``s^2`` (Eq. 4): ``4^-B / 3``, or ``4^-B / 12`` unsigned."""
    check_num_bits(num_bits)
    return 4.0**-num_bits / 12 * (signed.double() * 3 + 1 if isinstance(signed, Tensor) else signed * 3 + 1)


def range_and_sign(num_bits: int, signed: Sign) -> tuple[int, int, Tensor | None]:
    """``(low, high, signed tensor or None)``; if ``signed`` is a tensor, low and high are those of the signed grid."""
    sign = signed if isinstance(signed, Tensor) else None
    return *integer_range(num_bits, sign is not None or bool(signed)), sign


def bounds_for_sign(low: int, high: int, signed: Tensor | None, dtype: torch.dtype) -> tuple[Any, Any]:
    """Lowest and highest integer for the result of ``range_and_sign``; tensors ``[]`` if ``signed`` is a tensor."""
    if signed is None:
        return low, high
    lowest = signed.to(dtype) * low
    return lowest, lowest + (high - low)


def round_to_grid(x: Tensor, clip: Tensor, num_bits: int, *, signed: Sign = True) -> Tensor:
    """Quantize and dequantize: round to the nearest grid value, ties to the even integer.

    Args:
        x: floating point, any shape.
        clip: clipping scalar(s) ``s >= 0``, broadcastable against ``x``. The result is 0 where it is 0.
        num_bits: 2 to 8.
        signed: ``True`` for two's complement, ``False`` for unsigned, where a negative ``x`` becomes 0; or a bool
            tensor ``[]``.

    Returns:
        ``step * clamp(round(x / step))``, same shape as ``x``, float32 (float64 for float64 input). NaN stays NaN.

    Raises:
        TypeError: ``clip`` is not a floating-point tensor.
    """
    check_floating(clip, "round_to_grid (clip)")
    step = step_size(clip.to(statistics_dtype(x.dtype)), num_bits, signed)
    return round_to_step(x, step, *bounds_for_sign(*range_and_sign(num_bits, signed), step.dtype))


def round_to_step(x: Tensor, step: Tensor, low: Any, high: Any) -> Tensor:
    """``round_to_grid`` for a grid given by its step and integer range; the result has the dtype of ``step``."""
    return integers_of(x, step, low, high).mul_(step)


def integers_of(x: Tensor, step: Tensor, low: Any, high: Any) -> Tensor:
    """The integers of ``round_to_step``, in the dtype of ``step``."""
    # The cast is explicit because a 0-dim step does not promote x. A zero step (all-zero data, or a clip that
    # underflows) is replaced by 1, because 0 / 0 is NaN.
    return (x.to(step.dtype) / (step + (step == 0))).round_().clamp_(low, high)
