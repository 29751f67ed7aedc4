"""Integer codes of a quantized tensor on a CPU, in C++ (``codes.cpp``), which takes a quarter of Inductor's time."""

import functools
from ctypes import c_bool, c_float, c_int, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from .compilation import can_compile
from .cpu import LOOPS, load

_FLAGS = (*LOOPS, "-fno-math-errno", "-fno-trapping-math")  # vectorize rounding and conversion
_PARALLEL = 1 << 15  # elements that make threads worthwhile
_Index = c_int64 * 3


def round_to_codes(
    x: Tensor, clip: Tensor, low: int, high: int, signed: Tensor | None, offset: Tensor | None, dtype: torch.dtype
) -> Tensor | None:
    """``fake_quantize.round_to_codes`` with a contiguous result; ``None`` if the arguments are not supported."""
    shape = x.shape
    if not can_compile(x, ("cpu",)) or not 1 <= x.dim() <= 4 or x.dtype != torch.float32 or x.stride(-1) != 1:
        return None
    per_row = clip.numel() > 1
    if dtype not in (torch.uint8, torch.float32) or clip.dtype != torch.float32 or (per_row and clip.shape[-1] != 1):
        return None
    library = _library()
    if library is None:
        return None
    if per_row:
        clip = clip.expand(*shape[:-1], 1).contiguous()
    if signed is not None and not bool(signed):
        low, high = 0, high - low
    codes = torch.empty(shape, dtype=dtype, device=x.device)
    ones = (1,) * (4 - len(shape))
    library.round_to_codes(
        x.data_ptr(),
        _Index(*ones, *shape[:-1]),
        _Index(*ones, *x.stride()[:-1]),
        shape[-1],
        clip.data_ptr(),
        per_row,
        low,
        high,
        0.0 if offset is None else float(offset),
        dtype == torch.uint8,
        codes.data_ptr(),
        torch.get_num_threads() if codes.numel() >= _PARALLEL else 1,
    )
    return codes


@functools.cache
def _library() -> Any:
    """The C++ functions; ``None`` if they do not compile."""
    library = load("codes.cpp", _FLAGS)
    if library is None:
        return None
    library.round_to_codes.restype = None
    grid = c_void_p, c_bool, c_float, c_float, c_float
    library.round_to_codes.argtypes = [c_void_p, _Index, _Index, c_int64, *grid, c_bool, c_void_p, c_int]
    return library
