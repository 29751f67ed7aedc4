"""The operations behind clips on a CUDA device, by the kernels in ``triton_kernels.py``.

Arguments and results are those of the functions of the same names in ``table.py``, ``octav.py`` and ``mse.py``.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from ..mse import BEYOND_TOP_OF_ROW, HIGHEST, LOWEST_OF_ROW, NEAR_OF_ROW
from ..table import uses_table
from .compilation import disable_kernels, kernels_disabled

DEVICE_TYPES: tuple[str, ...] = ("cuda",)

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int64)  # of values and of tables
_BLOCK = 2048  # values that a program counts
_PACKED = 1 << 22  # most values in a packed table, which overflows at 2^23
_TABLES = 64  # of rows, each of 1.5 MB, that are in memory at once


def is_supported(x: Tensor) -> bool:
    """Whether the kernels can be used for ``x``, values or a table."""
    if x.dtype not in _DTYPES or x.device.type not in DEVICE_TYPES:
        return False
    return not kernels_disabled() and _triton_kernels(x.device) is not None


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
        return torch.cat([_solve(_tables(part, skip), num_bits, signed, mse) for part in rows.split(_TABLES)])
    result = torch.empty(rows.shape[0], dtype=torch.float32, device=rows.device)
    block = 1 << max(5, (rows.shape[1] - 1).bit_length())
    of_bits = (LOWEST_OF_ROW, HIGHEST, BEYOND_TOP_OF_ROW, NEAR_OF_ROW)
    search = [values[num_bits] if mse else None for values in of_bits]
    arguments = (rows, skip, result, rows.shape[1], num_bits, signed, *search, block)
    with torch.cuda.device_of(rows):
        _triton_kernels(rows.device).clips_of_rows[(len(rows),)](*arguments, num_warps=min(32, max(1, block // 512)))
    return result


def _tables(rows: Tensor, skip: Tensor | None) -> Tensor:
    """The tables of ``[rows, n]``, contiguous: int64 ``[rows, 2, 2, 32768]``; of nothing if ``skip`` is true."""
    triton = _triton_kernels(rows.device)
    (count, length), bins = rows.shape, triton.BINS.value
    blocks = -(-length // _BLOCK)
    parts = -(-blocks * _BLOCK // _PACKED)
    packed = torch.zeros(count, parts, bins, dtype=torch.int64, device=rows.device)
    tables = torch.empty(count, 2, 2, bins // 2, dtype=torch.int64, device=rows.device)
    with torch.cuda.device_of(rows):
        triton.count[(blocks, count)](rows, skip, packed, length, parts, _BLOCK, num_warps=8)
        triton.unpack[(bins // 1024, count)](packed, tables, parts, 1024)
    return tables


def _solve(tables: Tensor, num_bits: int, signed: Tensor, mse: bool) -> Tensor:
    """The clips of tables, ``[rows, 2, 2, 32768]``: ``[rows]``."""
    triton, tables = _triton_kernels(tables.device), tables.contiguous()
    count, sets = len(tables), 3 if mse else 1
    tails = torch.empty(count, sets, triton.SET.value, dtype=torch.float64, device=tables.device)
    result = torch.empty(count, dtype=torch.float32, device=tables.device)
    with torch.cuda.device_of(tables):
        triton.fixed_point_of_table[(sets, count)](tables, tails, result, num_bits, signed, num_warps=16)
        if mse:
            arguments = (tails, result, num_bits, HIGHEST[num_bits], signed)
            triton.lowest_error_of_tails[(count,)](*arguments, num_warps=16)
    return result


@functools.cache
def _triton_kernels(device: torch.device) -> Any:
    """The module with the kernels; ``None`` if Triton is not installed or cannot launch, as without a C compiler."""
    try:
        from . import triton_kernels
    except ImportError:
        return None
    try:
        table = torch.empty(2 * triton_kernels.BINS.value, dtype=torch.int64, device=device)
        with torch.cuda.device_of(table):
            triton_kernels.unpack[(1,)](table, table, 0, 1024)
    except Exception as error:
        disable_kernels(error)
        return None
    return triton_kernels
