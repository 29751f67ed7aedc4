"""The statistics that ``fixed_point.py`` needs, on a CUDA device, by the kernels in ``triton_kernels.py``."""

import functools
from typing import Any

import torch
from torch import Tensor

from .compilation import can_compile

DEVICE_TYPES: tuple[str, ...] = ("cuda",)

_BLOCK = 2048
_PROGRAMS = 1024  # at most: enough to fill every multiprocessor, few enough to sum up their results


def is_supported(x: Tensor) -> bool:
    return can_compile(x, DEVICE_TYPES) and _kernels() is not None


def sums(x: Tensor, thresholds: Tensor, signed: bool) -> Tensor:
    """Sums over parts of ``x`` in one read.

    Args:
        x: float32, bfloat16 or float16, ``[n]``, contiguous.
        thresholds: one or two, >= 0, float32.
        signed: whether magnitudes are ``|x|`` or ``max(x, 0)``.

    Returns:
        float32 ``[4, parts]``: with one threshold the sum of ``|x|``, the count of nonzero magnitudes, and the sum and
        count above it; with two the sum and count above each.
    """
    blocks = -(-x.numel() // _BLOCK)
    programs = min(blocks, _PROGRAMS)
    result = torch.empty(4, programs, dtype=torch.float32, device=x.device)
    _kernels().sums[(programs,)](x, thresholds, result, x.numel(), signed, len(thresholds) == 2, _BLOCK)
    return result


def row_updates(rows: Tensor, noise: float, start: float, signed: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Updates of Eq. 6 for each row, in one read: the last three clips, float32 ``[rows]``; NaN where undefined.

    Args:
        rows: float32, bfloat16 or float16, ``[rows, n]``, contiguous, n less than 2^15.
        noise: noise factor of Eq. 4.
        start: first clip, in units of the row's mean magnitude.
        signed: whether magnitudes are ``|x|`` or ``max(x, 0)``.
    """
    count, length = rows.shape
    block = 1 << max(4, (length - 1).bit_length())
    result = torch.empty(3, count, dtype=torch.float32, device=rows.device)
    warps = min(16, max(1, block // 512))
    _kernels().row_updates[(count,)](rows, result, count, length, noise, start, signed, block, num_warps=warps)
    before, clip, last = result
    return before, clip, last


@functools.cache
def _kernels() -> Any:
    """The module with the kernels; ``None`` if Triton is not installed."""
    try:
        from . import triton_kernels
    except ImportError:
        return None
    return triton_kernels
