"""OCTAV's clip and that of the lowest error on a CPU, by the C++ in ``octav_cpu.cpp`` and ``mse_cpu.cpp``."""

import ctypes
import functools
import itertools
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..._utils.torch_private import load_cpp
from ..grid import gaussian_clip, noise_factor
from .compilation import can_compile, disable_kernels

# Elements from which it pays to compile or load the library (a second in each process), if nothing larger comes.
MIN_NUMEL = 1 << 12
# More for the compiler, for tests of the code for other processors.
FLAGS: tuple[str, ...] = ()

_SOURCES = ("octav_cpu.cpp", "mse_cpu.cpp")  # the second uses what the first defines
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def is_supported(rows: Tensor) -> bool:
    """Whether the functions below take ``rows``."""
    return rows.numel() >= MIN_NUMEL and can_compile(rows, ("cpu",))


def fixed_points(rows: Tensor, num_bits: int, signed: bool) -> Tensor | None:
    """The fixed point of Eq. 6 for each of ``rows``, by one read of a large tensor.

    Args:
        rows: float32, bfloat16 or float16, ``[rows, n]`` with n > 0.
        num_bits, signed: the grid.

    Returns:
        Clips, float32 ``[rows]``: 0 for a row of zeros, NaN where none can be proven, because Eq. 6 runs in a cycle, or
        values are not finite or too large to be summed up. ``None`` where the library cannot be had.
    """
    return _call("octav_clips", rows, num_bits, signed)


def lowest_errors(
    rows: Tensor, num_bits: int, signed: bool, coarse: Sequence[float], fine: Sequence[Sequence[float]]
) -> Tensor | None:
    """The clip of the lowest error among candidates, for each of ``rows``; see ``mse_clip``.

    Args:
        coarse: candidates in units of OCTAV's clip, seven of them; from 4 bits on, rows of at most 16384 elements have
            others.
        fine: two times four candidates in units of the best one so far.
        The others, and the result, as for ``fixed_points``.
    """
    factors = (array("f", coarse), array("f", itertools.chain.from_iterable(fine)))
    return _call("mse_clips", rows, num_bits, signed, *(values.buffer_info()[0] for values in factors))


def _call(function: str, rows: Tensor, num_bits: int, signed: bool, *more: int) -> Tensor | None:
    try:
        clips = _functions(FLAGS)[function]
    except Exception as error:  # of whatever kind: the compiler is missing, its cache cannot be written, …
        disable_kernels(error)
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
        *more,
    )
    return result


@functools.cache
def _functions(flags: tuple[str, ...]) -> dict[str, Any]:
    """The functions of the C++, compiled and kept on disk as torch does with the code that it generates itself."""
    folder = Path(__file__).parent
    source = "".join((folder / name).read_text(encoding="utf-8") for name in _SOURCES)
    library = load_cpp(source, flags)
    more = {"octav_clips": [], "mse_clips": [ctypes.c_void_p, ctypes.c_void_p]}
    functions = {name: getattr(library, name) for name in more}
    for name, function in functions.items():
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
            *more[name],
        ]
    return functions
