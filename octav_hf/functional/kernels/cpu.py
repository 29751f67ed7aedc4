"""Clips on a CPU, in C++ (``clips.cpp``).

Functions have the arguments and results of their namesakes in ``rows.py``, ``table.py``, ``octav.py`` and ``mse.py``.
"""

import platform
from ctypes import Array, c_bool, c_double, c_int64, c_void_p
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..._utils.torch_private import load_cpp
from ..mse import SEARCH_OF_ROW, SEARCH_OF_TABLE, Search
from ..table import uses_table
from .compilation import disable_kernels, kernels_disabled
from .operations import NotFinite

MIN_NUMEL = 1 << 12  # below this, loading the library (a second per process) is not worthwhile
FLAGS: tuple[str, ...] = ()  # extra compiler flags, for tests

LOOPS = ["-ftree-loop-vectorize", "-ffp-contract=fast"]  # override torch's flags
if platform.machine() in ("x86_64", "AMD64"):
    LOOPS.append("-mprefer-vector-width=512")  # by default GCC prefers 256; no effect without AVX-512
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int64: -1}  # int64 is a table
_libraries: dict[tuple[str, ...], Any] = {}  # by flags
_SIGNATURES: dict[str, tuple[Any, ...]] = {  # result and arguments
    "has_negative": (None, c_void_p, c_int64, c_int64, c_void_p),
    "magnitude_table": (None, c_void_p, c_int64, c_int64, c_int64, c_void_p),
    "clip_of_table": (None, c_void_p, c_int64, c_void_p, c_void_p, c_void_p),
    "clips_of_rows": (c_bool, c_void_p, *[c_int64] * 5, c_void_p, c_void_p, c_int64, c_void_p),
}


def is_supported(x: Tensor) -> bool:
    """Whether the library can be used for ``x``, a tensor of values or a table."""
    # The answer must not depend on whether the library is loaded already, or the last bits of a clip would depend on
    # earlier computations.
    if x.numel() < MIN_NUMEL or x.dtype not in _DTYPES or x.device.type != "cpu" or kernels_disabled():
        return False
    if FLAGS not in _libraries:
        library = load("clips.cpp", (*LOOPS, *FLAGS))
        if library is None:
            return False
        for name, (result, *arguments) in _SIGNATURES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
        _libraries[FLAGS] = library
    return True


def has_negative(x: Tensor) -> Tensor:
    x, found = _in_memory(x), torch.empty((), dtype=torch.bool, device=x.device)
    _libraries[FLAGS].has_negative(x.data_ptr(), _DTYPES[x.dtype], x.numel(), found.data_ptr())
    return found


def magnitude_table(x: Tensor) -> Tensor:
    x, table = _in_memory(x), torch.zeros(2, 2, 1 << 15, dtype=torch.int64, device=x.device)
    threads = torch.get_num_threads()
    _libraries[FLAGS].magnitude_table(x.data_ptr(), _DTYPES[x.dtype], x.numel(), threads, table.data_ptr())
    return table


def _clip_of_table(table: Tensor, num_bits: int, signed: Tensor, mse: bool) -> Tensor:
    table, clip = _in_memory(table), torch.empty((), dtype=torch.float32, device=table.device)
    search = _array(SEARCH_OF_TABLE[num_bits]) if mse else None
    _libraries[FLAGS].clip_of_table(table.data_ptr(), num_bits, _in_memory(signed).data_ptr(), search, clip.data_ptr())
    return clip


def _clips_of_rows(rows: Tensor, num_bits: int, signed: Tensor, skip: Tensor | None, check: bool, mse: bool) -> Tensor:
    count, length = rows.shape
    if skip is not None and bool(skip):
        return torch.zeros(count, dtype=torch.float32, device=rows.device)
    rows, clips = _in_memory(rows), torch.empty(count, dtype=torch.float32, device=rows.device)
    by_table = uses_table(rows)
    search = _array((SEARCH_OF_TABLE if by_table else SEARCH_OF_ROW)[num_bits]) if mse else None
    form = _DTYPES[rows.dtype], count, length, by_table
    grid = num_bits, _in_memory(signed).data_ptr(), search
    finite = _libraries[FLAGS].clips_of_rows(rows.data_ptr(), *form, *grid, torch.get_num_threads(), clips.data_ptr())
    if check and not finite:
        raise NotFinite
    return clips


fixed_point_of_table = partial(_clip_of_table, mse=False)
lowest_error_of_table = partial(_clip_of_table, mse=True)
octav_of_rows = partial(_clips_of_rows, mse=False)
mse_of_rows = partial(_clips_of_rows, mse=True)


def _in_memory(x: Tensor) -> Tensor:
    """``x`` with its values in the order of its dimensions and as they are, not to be negated when they are read."""
    if x.device.type != "cpu":
        shape = tuple(x.shape)
        raise ValueError(f"a tensor of shape {shape} is on {x.device}; C++ kernels need it on the CPU")
    return x.contiguous().resolve_neg()


@cache
def _array(search: Search) -> Array[c_double]:
    return (c_double * len(search))(*search)


def load(file: str, flags: tuple[str, ...]) -> Any:
    """Compile and load a C++ file of this package; torch caches the library on disk.

    If it does not compile, disable all compiled kernels and return ``None``.
    """
    try:
        return load_cpp(Path(__file__).with_name(file).read_text(encoding="utf-8"), flags)
    except Exception as error:  # such as no compiler, or a read-only cache
        disable_kernels(error)
        return None
