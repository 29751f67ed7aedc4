"""The fixed point of Eq. 6 on a CPU, by the C++ in ``octav_cpu.cpp``: one read of the tensor."""

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .compilation import give_up, may_serve
from .grid import gaussian_clip, noise_factor

# Elements from which it pays to compile or load the library (a second in each process), if nothing larger comes.
SMALLEST = 1 << 12
# More for the compiler, for tests of the code for other processors.
FLAGS: tuple[str, ...] = ()

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def serves(rows: Tensor) -> bool:
    """Whether ``fixed_points`` takes ``rows``."""
    return rows.numel() >= SMALLEST and may_serve(rows, ("cpu",))


def fixed_points(rows: Tensor, num_bits: int, signed: bool) -> Tensor | None:
    """The fixed point of Eq. 6 for each of ``rows``.

    Args:
        rows: float32, bfloat16 or float16, ``[rows, n]`` with n > 0.
        num_bits, signed: the grid.

    Returns:
        Clips, float32 ``[rows]``: 0 for a row of zeros, NaN where none can be proven, because Eq. 6 runs in a cycle, or
        values are not finite or too large to be summed up. ``None`` where the library cannot be had.
    """
    try:
        clips = _library(FLAGS)
    except Exception as error:  # of whatever kind: the compiler is missing, its cache cannot be written, …
        give_up(error)
        return None
    rows = rows.contiguous().resolve_neg()
    result = torch.empty(rows.shape[0], dtype=torch.float32)
    noise = noise_factor(num_bits, signed)
    clips(
        rows.data_ptr(),
        _DTYPES[rows.dtype],
        *rows.shape,
        num_bits,
        signed,
        noise,
        gaussian_clip(noise),
        torch.get_num_threads(),
        result.data_ptr(),
    )
    return result


@functools.cache
def _library(flags: tuple[str, ...]) -> Any:
    """``octav_clips`` of the C++, compiled and kept on disk as torch does with the code that it generates itself."""
    # Not at the top: it costs a second that a program without large tensors need not spend.
    from torch._inductor.codecache import CppCodeCache

    source = Path(__file__).with_suffix(".cpp").read_text(encoding="utf-8")
    function = CppCodeCache.load(source, extra_flags=flags).octav_clips
    function.restype = None
    function.argtypes = [
        ctypes.c_void_p,
        ctypes.c_int,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_double,
        ctypes.c_double,
        ctypes.c_int,
        ctypes.c_void_p,
    ]
    return function
