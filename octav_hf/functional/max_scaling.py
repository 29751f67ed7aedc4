"""Max-scaling: the largest magnitude as the clip."""

import torch
from torch import Tensor

from .all_ranks import AllRanks, check_whole
from .grid import check_num_bits
from .registry import register_clip_rule
from .rows import Dim, check_floating, finite_range, magnitude, statistics_dtype, to_rows


@register_clip_rule("max")
@torch.no_grad()
def max_clip(
    x: Tensor, num_bits: int, *, signed: bool = True, dim: Dim = None, ranks: AllRanks | None = None
) -> Tensor:
    """``s = max|x|`` (section 2), or ``max(x, 0)`` unsigned. Arguments, result and errors as in ``octav_clip``.

    ``num_bits`` is checked, but does not change the result.
    """
    check_floating(x, "max_clip")
    check_num_bits(num_bits)
    if ranks is not None:
        check_whole(dim, "max_clip")
    if dim is None and (x.numel() > 0 or ranks is not None):
        low, high = finite_range(x, "max_clip") if ranks is None else (ranks.low, ranks.high)
        peak = max(-low, high) if signed else max(high, 0.0)
        return torch.tensor(peak, dtype=statistics_dtype(x.dtype), device=x.device)
    rows, shape = to_rows(x, dim)
    if rows.numel() == 0:
        return torch.zeros(shape, dtype=statistics_dtype(x.dtype), device=x.device)
    clip = magnitude(rows, signed).amax(dim=1)
    lowest = clip if signed else rows.amin(dim=1)
    if not (clip.isfinite() & lowest.isfinite()).all():
        finite_range(x, "max_clip")  # raises
    return clip.reshape(shape)
