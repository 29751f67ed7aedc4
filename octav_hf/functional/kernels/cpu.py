"""Clips on a CPU, in C++ (``clips.cpp``).

Functions have the arguments and results of their namesakes in ``rows.py``, ``table.py``, ``octav.py`` and ``mse.py``.
"""

import platform
from ctypes import c_double, c_int64, c_void_p
from functools import partial
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
        _libraries[FLAGS] = library
    return True


def has_negative(x: Tensor) -> Tensor:
    found = torch.empty((), dtype=torch.bool, device=x.device)
    _call("has_negative", x, _DTYPES[x.dtype], x.numel(), found)
    return found


def magnitude_table(x: Tensor) -> Tensor:
    table = torch.zeros(2, 2, 1 << 15, dtype=torch.int64, device=x.device)
    _call("magnitude_table", x, _DTYPES[x.dtype], x.numel(), torch.get_num_threads(), table)
    return table


def _clip_of_table(table: Tensor, num_bits: int, signed: Tensor, mse: bool) -> Tensor:
    clip = torch.empty((), dtype=torch.float32, device=table.device)
    _call("clip_of_table", table, num_bits, signed, SEARCH_OF_TABLE[num_bits] if mse else None, clip)
    return clip


def _clips_of_rows(rows: Tensor, num_bits: int, signed: Tensor, skip: Tensor | None, check: bool, mse: bool) -> Tensor:
    clips = torch.zeros(len(rows), dtype=torch.float32, device=rows.device)
    if skip is None or not bool(skip):
        by_table, threads = uses_table(rows), torch.get_num_threads()
        search = (SEARCH_OF_TABLE if by_table else SEARCH_OF_ROW)[num_bits] if mse else None
        shape = (_DTYPES[rows.dtype], *rows.shape, by_table)
        _call("clips_of_rows", rows, *shape, num_bits, signed, search, threads, clips)
    if check and bool(clips.isnan().any()):
        raise NotFinite
    return clips


fixed_point_of_table = partial(_clip_of_table, mse=False)
lowest_error_of_table = partial(_clip_of_table, mse=True)
octav_of_rows = partial(_clips_of_rows, mse=False)
mse_of_rows = partial(_clips_of_rows, mse=True)


def _call(name: str, *arguments: Tensor | Search | int | None) -> None:
    """Call a function of the library with the addresses of tensors; the last tensor receives the result."""
    passed: list[Any] = []
    tensors = []  # keeps the memory alive
    for argument in arguments:
        if isinstance(argument, Tensor):
            if argument.device.type != "cpu":
                shape = tuple(argument.shape)
                raise ValueError(f"a tensor of shape {shape} is on {argument.device}; C++ kernels need it on the CPU")
            tensors.append(argument.contiguous().resolve_neg())
            passed.append(c_void_p(tensors[-1].data_ptr()))
        elif isinstance(argument, Search):
            passed.append((c_double * len(argument))(*argument))
        else:
            passed.append(c_int64(argument or 0))
    getattr(_libraries[FLAGS], name)(*passed)


def load(file: str, flags: tuple[str, ...]) -> Any:
    """Compile and load a C++ file of this package; torch caches the library on disk.

    If it does not compile, disable all compiled kernels and return ``None``.
    """
    try:
        return load_cpp(Path(__file__).with_name(file).read_text(encoding="utf-8"), flags)
    except Exception as error:  # such as no compiler, or a read-only cache
        disable_kernels(error)
        return None
