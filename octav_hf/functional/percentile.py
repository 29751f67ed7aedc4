"""Percentile clipping: the clip is a percentile of the magnitudes."""

import math
import numbers

import torch
from torch import Tensor

from .._utils.escaping import shown
from .grid import check_num_bits
from .registry import register_clip_rule
from .rows import Dim, Sign, check_floating, clips_of, magnitude, operation_of_rows
from .table import Tails, is_finite


def _check_options(percentile: float = 99.9) -> None:
    is_number = isinstance(percentile, numbers.Real) and not isinstance(percentile, bool)
    if not is_number or not 0 < percentile <= 100:
        raise ValueError(f"percentile must be above 0 and at most 100, got {shown(percentile)}; a usual value is 99.9")


def percentile_of_table(table: Tensor, num_bits: int, signed: Tensor, percentile: float = 99.9) -> Tensor:
    """``percentile_clip`` of a magnitude table; arguments and result as in ``octav_of_table``. The bin is exact."""
    counts = (table[0] * torch.stack([torch.ones_like(signed), signed]).view(2, 1)).sum(dim=0)
    number, bins = table[0].sum(), torch.arange(len(counts), dtype=torch.int64, device=table.device)
    # 99.9 % of 1000 is 999.0000000000001 in floating point; the rank is 999.
    rank = (number.double() * (percentile / 100) - 1e-6).ceil().clamp(min=1)
    above = number - rank
    bin_of_rank = (counts.sum() - counts.cumsum(0) > above).sum()
    # Tails uses only the 32 octaves below the highest bin, and the rank may be below them.
    is_near = bins <= bin_of_rank + 1
    above_near = above - (counts * ~is_near).sum()
    clip = Tails(table * is_near, signed).crossing(lambda _, count, excess: above_near + 0.5 - count)
    return torch.where(is_finite(table), torch.where(bin_of_rank > 0, clip, 0.0), torch.nan).float()


@register_clip_rule("percentile", check_options=_check_options, of_table=percentile_of_table, tensor_sign=True)
@torch.no_grad()
def percentile_clip(
    x: Tensor,
    num_bits: int,
    *,
    signed: Sign = True,
    dim: Dim = None,
    skip: Tensor | None = None,
    percentile: float = 99.9,
) -> Tensor:
    """The nearest-rank percentile of the magnitudes, zeros included (the inverted empirical distribution function).

    Arguments, result and errors as in ``octav_clip``; the paper's static variants use 99.9, 99.99 and 99.999. If at
    least this share of the elements is 0, the clip is 0 and every element is quantized to 0. ``num_bits`` is checked,
    but does not change the result. For rows of 32768 elements or more, the percentile is read from the magnitude
    table: its bin (1/128 octave) is exact, its position in the bin an estimate.

    Args:
        percentile: above 0, at most 100; 100 gives max-scaling.
    """
    check_floating(x, "percentile_clip")
    check_num_bits(num_bits)
    _check_options(percentile)
    return clips_of(percentile_of_rows, x, dim, num_bits, signed, skip, float(percentile), name="percentile_clip")


@operation_of_rows(percentile_of_table, ", float percentile")
def percentile_of_rows(rows: Tensor, num_bits: int, signed: Tensor, percentile: float) -> Tensor:
    """The percentile of each row of ``[rows, n]``: ``[rows]``."""
    rank = max(1, math.ceil(percentile / 100 * rows.shape[1] - 1e-6))
    clips = magnitude(rows, signed).kthvalue(rank, dim=1).values
    return torch.where(rows.abs().amax(dim=1) < torch.inf, clips, torch.nan)
