"""The operations behind clips on a CPU, in C++: ``clips.cpp``.

Arguments and results are those of the functions of the same names in ``rows.py``, ``table.py``, ``octav.py`` and
``mse.py``.
"""

import platform
from ctypes import c_bool, c_int, c_int64, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..._utils.torch_private import load_cpp
from .compilation import disable_kernels, kernels_disabled
from .operations import NotFinite

MIN_NUMEL = 1 << 12  # elements from which loading the library, which takes a second per process, is worthwhile
FLAGS: tuple[str, ...] = ()  # extra compiler flags, for tests

LOOPS = ["-ftree-loop-vectorize", "-ffp-contract=fast"]  # torch's own flags forbid both
if platform.machine() in ("x86_64", "AMD64"):
    LOOPS.append("-mprefer-vector-width=512")  # of AVX-512, which GCC hesitates to use; no effect without it
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int64: -1}  # of values and of tables
_OCTAV, _MSE = 0, 1
_libraries: dict[tuple[str, ...], Any] = {}  # by their flags


def is_supported(x: Tensor) -> bool:
    """Whether the library can be used for ``x``: values, or their table."""
    # Whether the library is loaded already must not matter, or the last bits would depend on what was computed before.
    if x.numel() < MIN_NUMEL or x.dtype not in _DTYPES or x.device.type != "cpu":
        return False
    if kernels_disabled():
        return False
    if FLAGS not in _libraries:
        try:
            _libraries[FLAGS] = _load(FLAGS)
        except Exception as error:  # such as no compiler, or a read-only cache
            disable_kernels(error)
            return False
    return True


def has_negative(x: Tensor) -> Tensor:
    x = _in_memory(x)
    found = _libraries[FLAGS].has_negative(x.data_ptr(), _DTYPES[x.dtype], x.numel())
    return torch.tensor(found, dtype=torch.bool, device=x.device)


def magnitude_table(x: Tensor) -> Tensor:
    x = _in_memory(x)
    table = torch.zeros(2, 2, 1 << 15, dtype=torch.int64, device=x.device)
    threads = torch.get_num_threads()
    _libraries[FLAGS].magnitude_table(x.data_ptr(), _DTYPES[x.dtype], x.numel(), threads, table.data_ptr())
    return table


def fixed_point_of_table(table: Tensor, num_bits: int, signed: Tensor) -> Tensor:
    return _clip_of_table(table, num_bits, signed, _OCTAV)


def lowest_error_of_table(table: Tensor, num_bits: int, signed: Tensor) -> Tensor:
    return _clip_of_table(table, num_bits, signed, _MSE)


def octav_of_rows(rows: Tensor, num_bits: int, signed: Tensor, skip: Tensor | None, check: bool) -> Tensor:
    return _clips_of_rows(rows, num_bits, signed, skip, check, _OCTAV)


def mse_of_rows(rows: Tensor, num_bits: int, signed: Tensor, skip: Tensor | None, check: bool) -> Tensor:
    return _clips_of_rows(rows, num_bits, signed, skip, check, _MSE)


def _clip_of_table(table: Tensor, num_bits: int, signed: Tensor, rule: int) -> Tensor:
    table = _in_memory(table)
    clip = torch.empty((), dtype=torch.float32, device=table.device)
    _libraries[FLAGS].clip_of_table(table.data_ptr(), num_bits, _in_memory(signed).data_ptr(), rule, clip.data_ptr())
    return clip


def _clips_of_rows(rows: Tensor, num_bits: int, signed: Tensor, skip: Tensor | None, check: bool, rule: int) -> Tensor:
    if rows.numel() == 0 or (skip is not None and bool(skip)):
        return torch.zeros(rows.shape[0], dtype=torch.float32, device=rows.device)
    rows = _in_memory(rows)
    count, length = rows.shape
    clips = torch.empty(count, dtype=torch.float32, device=rows.device)
    grid, threads = (num_bits, _in_memory(signed).data_ptr()), torch.get_num_threads()
    of_rows = _libraries[FLAGS].clips_of_rows
    finite = of_rows(rows.data_ptr(), _DTYPES[rows.dtype], count, length, *grid, rule, threads, clips.data_ptr())
    if check and not finite:
        raise NotFinite
    return clips


def _in_memory(x: Tensor) -> Tensor:
    """``x`` as it is read by address: contiguous, and negated if it is a view that stands for the negative."""
    if x.device.type != "cpu":
        raise ValueError(f"a tensor of shape {tuple(x.shape)} is on {x.device}; C++ reads memory of the CPU")
    return x.contiguous().resolve_neg()


def _load(flags: tuple[str, ...]) -> Any:
    """The C++ functions, compiled and cached on disk by torch's own means."""
    library = load_cpp(source_of("clips.cpp"), (*LOOPS, *flags))
    library.has_negative.restype = c_bool
    library.has_negative.argtypes = [c_void_p, c_int, c_int64]
    library.magnitude_table.restype = None
    library.magnitude_table.argtypes = [c_void_p, c_int, c_int64, c_int, c_void_p]
    library.clip_of_table.restype = None
    library.clip_of_table.argtypes = [c_void_p, c_int, c_void_p, c_int, c_void_p]
    library.clips_of_rows.restype = c_bool
    of_rows = [c_void_p, c_int, c_int64, c_int64, c_int, c_void_p, c_int, c_int, c_void_p]
    library.clips_of_rows.argtypes = of_rows
    return library


def source_of(name: str) -> str:
    """The text of a file in C++ beside this one."""
    return Path(__file__).with_name(name).read_text(encoding="utf-8")
