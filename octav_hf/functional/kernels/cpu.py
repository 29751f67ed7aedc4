"""OCTAV's clip and the clip with the lowest error on a CPU: ``octav_cpu.cpp`` and ``mse_cpu.cpp``."""

import functools
import itertools
from array import array
from collections.abc import Sequence
from ctypes import c_double, c_int, c_int64, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..._utils.torch_private import load_cpp
from ..grid import gaussian_clip, noise_factor
from .compilation import can_compile, disable_kernels

MIN_NUMEL = 1 << 12  # elements from which loading the library, which takes a second per process, is worthwhile
FLAGS: tuple[str, ...] = ()  # extra compiler flags, for tests

_SOURCES = ("octav_cpu.cpp", "mse_cpu.cpp")  # the second uses what the first defines
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def is_supported(rows: Tensor) -> bool:
    return rows.numel() >= MIN_NUMEL and can_compile(rows, ("cpu",))


def fixed_points(rows: Tensor, num_bits: int, signed: bool) -> Tensor | None:
    """As ``fixed_point.fixed_points``, but 0 for a row of zeros; ``None`` if the library is not available."""
    return _call("octav_clips", rows, num_bits, signed)


def lowest_errors(
    rows: Tensor, num_bits: int, signed: bool, coarse: Sequence[float], fine: Sequence[Sequence[float]]
) -> Tensor | None:
    """The clip with the lowest error among candidates, for each row; see ``mse_clip``. Otherwise as ``fixed_points``.

    Args:
        coarse: seven candidates in units of OCTAV's clip; not used for rows of up to 16384 elements from 4 bits on.
        fine: two times four candidates in units of the best so far.
    """
    factors = (array("f", coarse), array("f", itertools.chain.from_iterable(fine)))
    return _call("mse_clips", rows, num_bits, signed, *(values.buffer_info()[0] for values in factors))


def _call(function: str, rows: Tensor, num_bits: int, signed: bool, *more: int) -> Tensor | None:
    try:
        clips = _functions(FLAGS)[function]
    except Exception as error:  # such as no compiler, or a read-only cache
        disable_kernels(error)
        return None
    if rows.device.type != "cpu":
        raise ValueError(
            f"{function}: rows of shape {tuple(rows.shape)} are on {rows.device}; C++ reads memory of the CPU"
        )
    rows = rows.contiguous().resolve_neg()
    result = torch.empty(rows.shape[0], dtype=torch.float32, device=rows.device)
    noise = noise_factor(num_bits, signed)
    grid = (num_bits, signed, noise, gaussian_clip(noise))
    clips(rows.data_ptr(), _DTYPES[rows.dtype], *rows.shape, *grid, torch.get_num_threads(), result.data_ptr(), *more)
    return result


@functools.cache
def _functions(flags: tuple[str, ...]) -> dict[str, Any]:
    """The C++ functions, compiled and cached on disk by torch's own means."""
    folder = Path(__file__).parent
    source = "".join((folder / name).read_text(encoding="utf-8") for name in _SOURCES)
    library = load_cpp(source, flags)
    octav, mse = library.octav_clips, library.mse_clips
    octav.restype = mse.restype = None
    octav.argtypes = [c_void_p, c_int, c_int64, c_int64, c_int, c_int, c_double, c_double, c_int, c_void_p]
    mse.argtypes = [*octav.argtypes, c_void_p, c_void_p]
    return {"octav_clips": octav, "mse_clips": mse}
