"""Max-scaling: the largest magnitude as the clip."""

import torch
from torch import Tensor

from .grid import check_num_bits
from .registry import register_clip_rule
from .rows import Dim, Sign, check_floating, clips_of, magnitude, operation_of_rows


@register_clip_rule("max", of_range=True, tensor_sign=True)
@torch.no_grad()
def max_clip(x: Tensor, num_bits: int, *, signed: Sign = True, dim: Dim = None, skip: Tensor | None = None) -> Tensor:
    """``s = max|x|`` (section 2), or ``max(x, 0)`` unsigned. Arguments, result and errors as in ``octav_clip``.

    ``num_bits`` is checked, but does not change the result.
    """
    check_floating(x, "max_clip")
    check_num_bits(num_bits)
    return clips_of(max_of_rows, x, dim, num_bits, signed, skip, name="max_clip")


@operation_of_rows()
def max_of_rows(rows: Tensor, num_bits: int, signed: Tensor) -> Tensor:
    """The largest magnitude of each row of ``[rows, n]``: ``[rows]``."""
    # amin and amax propagate NaN. aminmax with dim=1 is many times slower.
    low, high = (rows.amin(dim=1), rows.amax(dim=1)) if len(rows) > 1 else map(torch.atleast_1d, torch.aminmax(rows))
    largest = torch.maximum(magnitude(low, signed), magnitude(high, signed))
    return torch.where((low > -torch.inf) & (high < torch.inf), largest, torch.nan)
