"""Brute-force search for the clip with the lowest measured error."""

import torch
from torch import Tensor

from .._utils.escaping import shown
from .error import rows_errors
from .grid import check_num_bits
from .registry import register_clip_rule
from .rows import Dim, check_floating, magnitude, not_finite_error, statistics_dtype, to_rows

_MAX_POINTS = 10_000


def _check_options(num_points: int = 100) -> None:
    if not isinstance(num_points, int) or isinstance(num_points, bool) or not 1 <= num_points <= _MAX_POINTS:
        raise ValueError(
            f"num_points must be an integer from 1 to {_MAX_POINTS}, got {shown(num_points)}; the paper uses 100"
        )


@register_clip_rule("mse_sweep", check_options=_check_options)
@torch.no_grad()
def mse_sweep_clip(x: Tensor, num_bits: int, *, signed: bool = True, dim: Dim = None, num_points: int = 100) -> Tensor:
    """The best of the clips ``k / num_points * max|x|``, ``k = 1 ... num_points``, by measured error (Appendix E.3).

    Arguments, result and errors as in ``octav_clip``; ties go to the smallest clip. It reads the tensor ``num_points``
    times and synchronizes with the device to check for NaN and Inf; in the paper, OCTAV takes a tenth of its time
    (Table 6).

    Args:
        num_points: number of candidates, 1 to 10000; 100 in the paper.
    """
    check_floating(x, "mse_sweep_clip")
    check_num_bits(num_bits)
    _check_options(num_points)
    if not x.isfinite().all():
        raise not_finite_error(x, "mse_sweep_clip")
    rows, shape = to_rows(x, dim)
    best = torch.zeros(rows.shape[0], dtype=statistics_dtype(x.dtype), device=x.device)
    if rows.numel() == 0:
        return best.reshape(shape)
    peak = magnitude(rows, signed).amax(dim=1)
    best_error = torch.full_like(best, torch.inf)
    for k in range(1, num_points + 1):
        candidate = peak * (k / num_points)
        error = rows_errors(rows, candidate[None], num_bits, signed)[0]
        best = torch.where(error < best_error, candidate, best)
        best_error = torch.minimum(error, best_error)
    return best.reshape(shape)
