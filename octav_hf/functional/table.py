"""The magnitude table, a histogram of a tensor from which the rules octav, mse and percentile compute their clips.

The bin of a value is the upper 16 bits of its float32 pattern (its bfloat16 prefix), which gives 128 bins per octave.
Each bin holds the count of its values and the sum of their lower 16 bits, the rests. Both are integers, so a table does
not depend on the order of the values, and the tables of a tensor's parts add up to the table of the tensor.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .kernels.operations import operation

LONG_ROW = 1 << 15
"""Smallest number of elements for which a row's clip is computed from its table; shorter rows are computed exactly."""
_BINS = 1 << 15
_NOT_FINITE = 255 << 7  # the first bin of Inf and NaN
_REST_BITS = 16
_PIECE = 1 << 20
_WINDOW = 32 * 128  # bins below the highest that are used: a clip is above max / (c N + 1)
_PARTS, _ROUNDS = 64, 3  # of the search in a bin: a threshold is found to 64^-3 of the bin's width


def uses_table(rows: Tensor) -> bool:
    """Whether the clips of ``[rows, n]`` are computed from magnitude tables."""
    return rows.shape[1] >= LONG_ROW and rows.dtype != torch.float64


def empty_clip(table: Tensor, *_: object) -> Tensor:
    """Fake implementation of an operation that computes a clip from a table."""
    return torch.empty((), dtype=torch.float32, device=table.device)


def _empty_table(x: Tensor) -> Tensor:
    return torch.empty(2, 2, _BINS, dtype=torch.int64, device=x.device)


@operation("(Tensor x) -> Tensor", _empty_table)
def magnitude_table(x: Tensor) -> Tensor:
    """The magnitude table of ``x`` (float32, bfloat16 or float16, any shape): int64 ``[2, 2, bins]``.

    The first index is 0 for counts and 1 for sums of rests, the second 0 for a positive and 1 for a negative sign bit.
    """
    table = torch.zeros(2, 2 * _BINS, dtype=torch.int64, device=x.device)
    for piece in x.reshape(-1).split(_PIECE):
        bits = piece.to(torch.float32).view(torch.int32).to(torch.int64) & 0xFFFFFFFF
        place, rest = bits >> _REST_BITS, bits & 0xFFFF
        table.scatter_add_(1, torch.stack([place, place]), torch.stack([torch.ones_like(rest), rest]))
    return table.view(2, 2, _BINS)


def has_negative_bin(table: Tensor) -> Tensor:
    """Whether a counted value is negative: bool ``[]``. Minus zero is not."""
    counts, rests = table.select(1, 1)
    return (counts.narrow(0, 1, _BINS - 1).sum() + rests.select(0, 0)) > 0


def is_finite(table: Tensor) -> Tensor:
    """Whether no counted value is NaN or Inf: bool ``[]``."""
    return table.select(0, 0).narrow(1, _NOT_FINITE, _BINS - _NOT_FINITE).sum() == 0


class Tails:
    """Count and excess of the magnitudes (``|x|``, or ``max(x, 0)`` unsigned) above thresholds, from a table.

    Inside a bin, values are assumed to have a linear density with the bin's mean. Some values are instead placed at one
    point, the crowd: a single value, values without rest, and, in a bin with far more values than its two neighbours
    (such as the 6 of a ReLU6), the surplus over the smaller neighbour.

    Args:
        table: from ``magnitude_table``, or the sum of the tables of a tensor's parts.
        signed: bool ``[]``; if false, negative values count as zeros.

    Attributes:
        nonzero: number of nonzero magnitudes, ``[]`` float64.
        edges: lower edges of the bins that are used, ascending, ``[bins]`` float64.
        top: upper bound of the largest magnitude, exact if it is alone in its bin, ``[]`` float64.
    """

    def __init__(self, table: Tensor, signed: Tensor):
        numbers = torch.arange(_BINS, dtype=torch.int64, device=table.device)
        usable = (numbers > 0) & (numbers < _NOT_FINITE)  # bin 0 holds zeros and magnitudes below 2^-133
        counts, rests = table * usable * torch.stack([torch.ones_like(signed), signed]).view(2, 1)
        self.nonzero = counts.sum().double()
        highest = (numbers * (counts > 0)).amax()
        self._first = (highest - (_WINDOW - 1)).clamp(min=1)
        # One bin more than can be filled, so that every filled bin has an upper neighbour.
        window = self._first + torch.arange(_WINDOW + 1, dtype=torch.int64, device=table.device)
        count, rest = (part.index_select(1, window.clamp(max=_BINS - 1)).double() for part in (counts, rests))
        exponent = window >> 7
        width = ((exponent.clamp(min=1) + (1023 - 134)) << 52).view(torch.float64)
        self.edges = ((window & 127) + 128 * (exponent > 0)) * width
        mean = rest / (count * 2**_REST_BITS).clamp(min=1)
        beside = nn.functional.pad(count, (1, 1), mode="replicate")
        below, above = beside.narrow(1, 0, _WINDOW + 1), beside.narrow(1, 2, _WINDOW + 1)
        at_one_place = (count == 1) | (mean == 0)
        is_crowded = at_one_place | (count > 2 * (below + above))
        others = torch.where(at_one_place, 0.0, torch.minimum(below, above))
        crowd = torch.where(is_crowded, count - others, 0.0)
        place = ((count * mean - others / 2) / crowd.clamp(min=1)).clamp(0, 1)
        count_above = _sum_above(count)
        excess_above = _sum_above(count * (self.edges + mean * width)) - count_above * (self.edges + width)
        self.top = torch.where(count > 0, self.edges + width * torch.where(count > 1, 1.0, mean), 0.0).amax()
        spread_mean = torch.where(is_crowded, 0.5, mean)
        bins = (self.edges, width, count - crowd, spread_mean, crowd, place, count_above, excess_above)
        self._bins = torch.stack([values.expand(2, -1) for values in bins])

    def above(self, thresholds: Tensor) -> tuple[Tensor, Tensor]:
        """Number of magnitudes m above each threshold t >= 0 (float64, any shape), and their excess ``sum((m - t)+)``.

        Both are float64 ``[2, *shape]``: index 0 for positive values, 1 for negative ones.
        """
        index = (thresholds.to(torch.float32).view(torch.int32).to(torch.int64) >> _REST_BITS) - self._first
        bins = self._bins.index_select(2, index.flatten().clamp(0, _WINDOW)).view(-1, 2, *index.shape)
        edge, width, spread, mean, crowd, place, count_above, excess_above = bins
        u = ((thresholds - edge) / width).clamp(0, 1)
        rest, tilt = 1 - u, mean - 0.5
        count = count_above + spread * (rest * (1 + 6 * u * tilt)).clamp(0, 1) + crowd * (u < place)
        line = torch.maximum(rest * rest * (0.5 + tilt * (1 + 2 * u)), mean - u).clamp(min=0)
        inside = spread * line + crowd * (place - u).clamp(min=0)
        return count, excess_above + count_above * (edge + width - thresholds) + width * inside

    def crossing(self, function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        """The lowest threshold, ``[]`` float64, at which an increasing function is not negative.

        Args:
            function: maps thresholds ``[n]``, and the count and the excess above them, to ``[n]``.
        """
        points = self.edges
        shares = torch.arange(_PARTS + 1, dtype=torch.float64, device=points.device) / _PARTS
        for _ in range(1 + _ROUNDS):
            count, excess = (values.sum(dim=0) for values in self.above(points))
            index = (function(points, count, excess) < 0).sum().clamp(1, len(points) - 1).view(1)
            low, high = points.index_select(0, index - 1), points.index_select(0, index)
            points = low + (high - low) * shares
        return points.select(0, -1)


def _sum_above(values: Tensor) -> Tensor:
    """For each value, the sum of the values after it in its row."""
    return values.flip(1).cumsum(1).flip(1) - values
