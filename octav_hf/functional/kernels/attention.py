"""Integer attention with AVX512-VNNI, in C++ (``attention.cpp``)."""

import functools
from ctypes import c_float, c_int, c_int32, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from .compilation import can_compile
from .cpu import load

_FLAGS = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni", "-fno-math-errno")


def is_supported(x: Tensor) -> bool:
    """Whether ``attention`` can be used for operands like ``x``."""
    if x.dtype != torch.float32 or not can_compile(x, ("cpu",)):
        return False
    return torch.cpu.get_capabilities().get("avx512_vnni", False) and _library() is not None


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lowest: tuple[int, int, int],
    mask: Tensor | None,
    scales: tuple[float, float],
    probability_step: float,
    num_bits: int,
) -> Tensor:
    """Scaled dot-product attention on integer codes, with exact sums.

    Args:
        query: contiguous uint8 ``[batch, heads, L, E]``, codes counted from ``lowest[0]``.
        key: contiguous uint8 ``[batch, heads, S, E]``, codes of a signed grid counted from ``lowest[1]``.
        value: contiguous uint8 ``[batch, heads, S, V]``, codes of a signed grid counted from ``lowest[2]``.
        mask: added to the scores, float32, broadcastable to ``[batch, heads, L, S]``.
        scales: factors of the integer sums of the first and the second matmul.
        probability_step, num_bits: step and bits of the unsigned grid of the probabilities.

    Returns:
        float32 ``[batch, heads, L, V]``, in memory ``[batch, L, heads, V]``; zeros for a query whose keys are all
        masked.
    """
    batch, heads, length, channels = query.shape
    keys, width = value.shape[-2:]
    result = torch.empty(batch, length, heads, width, dtype=torch.float32, device=query.device)
    strides: tuple[int, ...] = (0, 0, 0)
    if mask is not None:
        mask = mask.expand(batch, heads, length, keys)
        if keys > 1 and mask.stride(-1) != 1:
            mask = mask.contiguous()
        strides = mask.stride()[:3]
    _library().attention(
        query.data_ptr(),
        key.data_ptr(),
        value.data_ptr(),
        (c_int64 * 6)(batch, heads, length, keys, channels, width),
        (c_int32 * 3)(*lowest),
        None if mask is None else mask.data_ptr(),
        (c_int64 * 3)(*strides),
        scales[0],
        probability_step,
        2.0**num_bits - 1,
        scales[1],
        result.data_ptr(),
        torch.get_num_threads(),
    )
    return result.transpose(1, 2)


@functools.cache
def _library() -> Any:
    """The C++ function; ``None`` if it does not compile."""
    library = load("attention.cpp", _FLAGS)
    if library is None:
        return None
    library.attention.restype = None
    pointers, scalars = [c_void_p] * 3, [c_float] * 4
    library.attention.argtypes = [*pointers, c_int64 * 6, c_int32 * 3, c_void_p, c_int64 * 3, *scalars, c_void_p, c_int]
    return library
