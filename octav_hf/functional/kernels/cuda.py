"""Kernels of CUDA devices: clips (``triton_kernels.py``), and rounding with its gradients (``cuda_loops.py``).

Functions have the arguments and results of their namesakes in ``table.py``, ``octav.py``, ``mse.py`` and
``fake_quantize.py``.
"""

from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from ..mse import SEARCH_OF_ROW, SEARCH_OF_TABLE
from ..table import uses_table
from .compilation import disable_kernels, kernels_disabled
from .cuda_loops import attenuate_outside, keep_inside, round_and_compare, round_to_levels

__all__ = [
    "attenuate_outside",
    "fixed_point_of_table",
    "is_supported",
    "keep_inside",
    "lowest_error_of_table",
    "magnitude_table",
    "mse_of_rows",
    "octav_of_rows",
    "round_and_compare",
    "round_to_levels",
]

DEVICE_TYPES: tuple[str, ...] = ("cuda",)

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int64)  # int64 is a table
_BLOCK = 2048  # values that a program counts
_BLOCKS = 8  # blocks that a program sums
_SAMPLE = 1 << 13  # values of the sample from which a clip is guessed
_PACKED = 1 << 22  # maximum of values in a packed table, which overflows at 2^23
_NO_SEARCH = (None,) * len(SEARCH_OF_TABLE[2])
_TABLES = 64  # tables in memory at once, 1.5 MB each
_SPREAD = 8  # maximum of packed tables per row, one for every 64 blocks: atomic additions to one address are serialized


def is_supported(x: Tensor) -> bool:
    """Whether the kernels can be used for ``x``, a tensor of values or a table."""
    if x.dtype not in _DTYPES or x.device.type not in DEVICE_TYPES:
        return False
    return not kernels_disabled() and _triton_kernels(x.device) is not None


def magnitude_table(x: Tensor) -> Tensor:
    return _tables(x.reshape(1, -1), None)[0]


def _clip_of_table(table: Tensor, num_bits: int, signed: Tensor, mse: bool) -> Tensor:
    return _clips_of_tables(table[None].contiguous(), None, num_bits, signed, 0.0, mse)[0]


def _clips_of_rows(rows: Tensor, num_bits: int, signed: Tensor, skip: Tensor | None, check: bool, mse: bool) -> Tensor:
    rows = rows.contiguous()
    if uses_table(rows):
        clips = [_clips_of_long_rows(part, num_bits, signed, skip, mse) for part in rows.split(_TABLES)]
        return clips[0] if len(clips) == 1 else torch.cat(clips)
    result = torch.empty(len(rows), dtype=torch.float32, device=rows.device)
    block = 1 << max(5, (rows.shape[1] - 1).bit_length())
    search = SEARCH_OF_ROW[num_bits] if mse else _NO_SEARCH
    arguments = (rows, skip, result, rows.shape[1], num_bits, signed, *search, block)
    with torch.cuda.device_of(rows):
        _triton_kernels(rows.device).clip_of_row[(len(rows),)](*arguments, num_warps=min(32, max(1, block // 512)))
    return result


fixed_point_of_table = partial(_clip_of_table, mse=False)
lowest_error_of_table = partial(_clip_of_table, mse=True)
octav_of_rows = partial(_clips_of_rows, mse=False)
mse_of_rows = partial(_clips_of_rows, mse=True)


def _clips_of_long_rows(rows: Tensor, num_bits: int, signed: Tensor, skip: Tensor | None, mse: bool) -> Tensor:
    """Clips of ``[rows, n]`` from tables that leave out the many values below a lower bound of the clip.

    A sample gives a threshold near the clip, and sums over all values make a lower bound of it; see ``_floor``.
    """
    triton, (count, length) = _triton_kernels(rows.device), rows.shape
    sums = torch.empty(count, 5, dtype=torch.float64, device=rows.device)
    with torch.cuda.device_of(rows):
        arguments = rows, skip, signed, sums, length
        triton.guess[(count,)](*arguments, num_bits, max(1, length // _SAMPLE), _SAMPLE, num_warps=16)
        triton.add_sums[(-(-length // (_BLOCK * _BLOCKS)), count)](*arguments, _BLOCKS, _BLOCK, num_warps=8)
    # The search reads magnitudes above half a step of the lowest candidate.
    reach = SEARCH_OF_TABLE[num_bits].lowest / 2**num_bits / 4 if mse else 1.0
    counted = sums, signed, num_bits, reach
    return _clips_of_tables(_tables(rows, skip, *counted), sums, num_bits, signed, reach, mse)


def _tables(
    rows: Tensor,
    skip: Tensor | None,
    sums: Tensor | None = None,
    signed: Tensor | None = None,
    num_bits: int = 0,
    reach: float = 0.0,
) -> Tensor:
    """The tables of ``[rows, n]``, contiguous: int64 ``[rows, 2, 2, 32768]``; zeros if ``skip`` is true.

    With ``sums``, magnitudes below ``reach`` times a lower bound of the clip are left out, and bins that are not
    counted stay unset.
    """
    triton = _triton_kernels(rows.device)
    (count, length), bins = rows.shape, triton.BINS.value
    blocks = -(-length // _BLOCK)
    parts = max(-(-blocks * _BLOCK // _PACKED), min(_SPREAD, blocks // 64, _TABLES // max(1, count)))
    packed = torch.zeros(count, parts, bins, dtype=torch.int64, device=rows.device)
    tables = torch.empty(count, 2, 2, bins // 2, dtype=torch.int64, device=rows.device)
    counted = sums, signed, num_bits, reach
    with torch.cuda.device_of(rows):
        triton.count[(blocks, count)](rows, skip, packed, length, parts, *counted, _BLOCK, num_warps=8)
        triton.unpack[(bins // 256, count)](packed, tables, parts, *counted, 256, num_warps=2)
    return tables


def _clips_of_tables(
    tables: Tensor, sums: Tensor | None, num_bits: int, signed: Tensor, reach: float, mse: bool
) -> Tensor:
    """The clips of tables ``[rows, 2, 2, 32768]``: ``[rows]``."""
    triton, count = _triton_kernels(tables.device), len(tables)
    tails = torch.empty(count, triton.TAILS.value, dtype=torch.float64, device=tables.device)
    result = torch.empty(count, dtype=torch.float32, device=tables.device)
    search = SEARCH_OF_TABLE[num_bits] if mse else _NO_SEARCH
    with torch.cuda.device_of(tables):
        triton.clip_of_table[(count,)](tables, tails, sums, result, num_bits, signed, reach, *search, num_warps=16)
    return result


@cache
def _triton_kernels(device: torch.device) -> Any:
    """The module with the kernels; ``None`` if Triton is not installed or cannot launch (it needs a C compiler)."""
    try:
        from . import triton_kernels
    except ImportError:
        return None
    try:
        table = torch.empty(2 * triton_kernels.BINS.value, dtype=torch.int64, device=device)
        with torch.cuda.device_of(table):
            triton_kernels.unpack[(1,)](table, table, 0, None, None, 0, 0.0, 256, num_warps=2)
    except Exception as error:
        disable_kernels(error)
        return None
    return triton_kernels
