"""Percentile clipping: a percentile of the magnitudes as the clip."""

import math
import numbers

import torch
from torch import Tensor

from .._utils.escaping import shown
from .grid import check_num_bits
from .registry import register_clip_rule
from .rows import Dim, check_floating, finite_range, magnitude, statistics_dtype, to_rows


def _check_options(percentile: float = 99.9) -> None:
    is_number = isinstance(percentile, numbers.Real) and not isinstance(percentile, bool)
    if not is_number or not 0 < percentile <= 100:
        raise ValueError(f"percentile must be above 0 and at most 100, got {shown(percentile)}; 99.9 is usual")


@register_clip_rule("percentile", check_options=_check_options)
@torch.no_grad()
def percentile_clip(
    x: Tensor, num_bits: int, *, signed: bool = True, dim: Dim = None, percentile: float = 99.9
) -> Tensor:
    """The nearest-rank percentile of the magnitudes, zeros included (the inverted empirical distribution function).

    Arguments, result and errors as in ``octav_clip``; the paper's static variants use 99.9, 99.99 and 99.999. If at
    least this share of the elements is 0, so is the clip, and everything is quantized to 0. ``num_bits`` is checked,
    but does not change the result.

    Args:
        percentile: above 0, at most 100; 100 is max-scaling.
    """
    check_floating(x, "percentile_clip")
    check_num_bits(num_bits)
    _check_options(percentile)
    finite_range(x, "percentile_clip")
    rows, shape = to_rows(x, dim)
    if rows.numel() == 0:
        return torch.zeros(shape, dtype=statistics_dtype(x.dtype), device=x.device)
    # 99.9 % of 1000 is 999.0000000000001 in floating point; its rank is 999.
    rank = max(1, math.ceil(percentile / 100 * rows.shape[1] - 1e-6))
    return magnitude(rows, signed).kthvalue(rank, dim=1).values.reshape(shape)
