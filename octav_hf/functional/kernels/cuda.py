"""The operations behind clips on a CUDA device, by the kernels in ``triton_kernels.py``.

Arguments and results are those of the functions of the same names in ``table.py``, ``octav.py`` and ``mse.py``.
"""

import functools
import os
from typing import Any

import torch
from torch import Tensor

from ..mse import HIGHEST
from ..table import uses_table
from .compilation import SWITCH, kernels_disabled

DEVICE_TYPES: tuple[str, ...] = ("cuda",)

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int64)  # of values and of tables
_BLOCK = 2048  # values that a program counts
_PACKED = 1 << 22  # at most so many in a packed table, which overflows at 2^23
_TABLES = 64  # rows whose tables, of 1.5 MB, are in memory at once


def is_supported(x: Tensor) -> bool:
    """Whether the kernels can be used for ``x``: values, or their table."""
    return (
        x.device.type in DEVICE_TYPES
        and x.dtype in _DTYPES
        and os.environ.get(SWITCH) != "0"
        and not kernels_disabled()
        and _kernels() is not None
    )


def magnitude_table(x: Tensor) -> Tensor:
    return _tables(x.reshape(1, -1), None)[0]


def fixed_point_of_table(table: Tensor, num_bits: int, signed: Tensor) -> Tensor:
    return _solve(table[None], num_bits, signed, mse=False)[0]


def lowest_error_of_table(table: Tensor, num_bits: int, signed: Tensor) -> Tensor:
    return _solve(table[None], num_bits, signed, mse=True)[0]


def octav_of_rows(rows: Tensor, num_bits: int, signed: Tensor, skip: Tensor | None, check: bool) -> Tensor:
    return _clips(rows, num_bits, signed, skip, mse=False)


def mse_of_rows(rows: Tensor, num_bits: int, signed: Tensor, skip: Tensor | None, check: bool) -> Tensor:
    return _clips(rows, num_bits, signed, skip, mse=True)


def _clips(rows: Tensor, num_bits: int, signed: Tensor, skip: Tensor | None, mse: bool) -> Tensor:
    rows = rows.contiguous()
    if uses_table(rows):
        return torch.cat([_solve(_tables(some, skip), num_bits, signed, mse) for some in rows.split(_TABLES)])
    count, length = rows.shape
    result = torch.empty(count, dtype=torch.float32, device=rows.device)
    block = 1 << max(5, (length - 1).bit_length())
    highest = HIGHEST[num_bits] if mse else None
    warps = min(16, max(1, block // 512))
    with torch.cuda.device_of(rows):
        _kernels().clips_of_rows[(count,)](rows, skip, result, length, num_bits, signed, highest, block, num_warps=warps)
    return result


def _tables(rows: Tensor, skip: Tensor | None) -> Tensor:
    """The table of each of ``[rows, n]``, contiguous: int64 ``[rows, 2, 2, 32768]``; empty ones if ``skip`` is true."""
    kernels = _kernels()
    count, length = rows.shape
    blocks = -(-length // _BLOCK)
    packed_tables = -(-blocks * _BLOCK // _PACKED)
    packed = torch.zeros(count, packed_tables, kernels.BINS.value, dtype=torch.int64, device=rows.device)
    tables = torch.empty(count, 2, 2, kernels.BINS.value // 2, dtype=torch.int64, device=rows.device)
    with torch.cuda.device_of(rows):
        kernels.count[(blocks, count)](rows, skip, packed, length, packed_tables, _BLOCK, num_warps=8)
        kernels.unpack[(kernels.BINS.value // 1024, count)](packed, tables, packed_tables, 1024)
    return tables


def _solve(tables: Tensor, num_bits: int, signed: Tensor, mse: bool) -> Tensor:
    """The clip of each table."""
    kernels = _kernels()
    count = len(tables)
    sets = 3 if mse else 1
    tails = torch.empty(count, sets, kernels.SET.value, dtype=torch.float64, device=tables.device)
    result = torch.empty(count, dtype=torch.float32, device=tables.device)
    with torch.cuda.device_of(tables):
        kernels.fixed_point_of_table[(sets, count)](tables, tails, result, num_bits, signed, num_warps=16)
        if mse:
            highest = HIGHEST[num_bits]
            kernels.lowest_error_of_tails[(count,)](tails, result, num_bits, highest, signed, num_warps=16)
    return result


@functools.cache
def _kernels() -> Any:
    """The module with the kernels; ``None`` if Triton is not installed."""
    try:
        from . import triton_kernels
    except ImportError:
        return None
    return triton_kernels
