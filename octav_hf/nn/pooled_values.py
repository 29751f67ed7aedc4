"""Clips of values from several ranks or calls, computed from pooled magnitude tables or ranges."""

import torch
from torch import Tensor

from ..functional.registry import RULES_OF_TABLES, clip_for_sign
from ..functional.rows import Sign
from .fake_quantize import FakeQuantize


def value_range(x: Tensor) -> Tensor:
    """Lowest and highest value of each row of ``[rows, n]``: ``[rows, 2]`` float64; ``(inf, -inf)`` if n is 0."""
    if x.shape[1] == 0:
        infinity = torch.full((x.shape[0],), torch.inf, dtype=torch.float64, device=x.device)
        return torch.stack([infinity, -infinity], dim=1)
    return torch.stack(torch.aminmax(x, dim=1), dim=1).double()  # NaN propagates


def pooled_range(ranges: Tensor) -> Tensor:
    """The range of all values, ``[..., 2]``, from the ranges of their parts, ``[parts, ..., 2]``."""
    low, high = ranges.unbind(dim=-1)
    return torch.stack([low.amin(dim=0), high.amax(dim=0)], dim=-1)


def clip_of_table(quantizer: FakeQuantize, table: Tensor, signed: Sign) -> Tensor:
    """The clip of the values counted in ``table``: float32 ``[]``."""
    rule = RULES_OF_TABLES[quantizer.clip]
    return rule(table, quantizer.num_bits, _sign_tensor(signed, table), **quantizer.clip_options)


def clip_of_range(quantizer: FakeQuantize, bounds: Tensor, signed: Sign) -> Tensor:
    """The clip of values with these bounds, ``[2]``, by a rule that depends only on them: float64 ``[]``."""
    low, high = bounds
    bounds = torch.where(low > high, 0, bounds)  # low > high if there are no values
    options = {"signed": _sign_tensor(signed, bounds), "dim": None, **quantizer.clip_options}
    return clip_for_sign(quantizer.clip, bounds, quantizer.num_bits, **options)


def _sign_tensor(signed: Sign, like: Tensor) -> Tensor:
    return signed if isinstance(signed, Tensor) else torch.full((), signed, dtype=torch.bool, device=like.device)
