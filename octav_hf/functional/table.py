"""The magnitude table: what octav, mse and percentile read off a tensor, once; they are functions of it.

Magnitudes are counted by the upper 16 bits of their float32 pattern, which are those of a bfloat16: 128 bins an octave,
each with the count of its values and the sum of their lower 16 bits, the rests. Both are integers, so a table does not
depend on the order of the values, and the tables of a tensor's parts add up to its own.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .kernels.operations import operation

LONG_ROW = 1 << 15
"""Elements from which a row's clip is a function of its table; that of a shorter one is exact."""
_BINS = 1 << 15
_NOT_FINITE = 255 << 7  # the first bin of Inf and NaN
_REST_BITS = 16
_PIECE = 1 << 20
_WINDOW = 32 * 128  # bins below the highest that matter: a clip is above max / (c N + 1)
_PARTS, _ROUNDS = 64, 3  # of a bin: a threshold is found to 64^-3 of the bin's width


def uses_table(rows: Tensor) -> bool:
    """Whether the clips of ``rows``, ``[rows, n]``, are functions of their tables."""
    return rows.shape[1] >= LONG_ROW and rows.dtype != torch.float64


def empty_clip(table: Tensor, *_: object) -> Tensor:
    """A result of the kind of ``fixed_point_of_table``, for tensors without values."""
    return torch.empty((), dtype=torch.float32, device=table.device)


def _empty_table(x: Tensor) -> Tensor:
    return torch.empty(2, 2, _BINS, dtype=torch.int64, device=x.device)


@operation("(Tensor x) -> Tensor", _empty_table)
def magnitude_table(x: Tensor) -> Tensor:
    """Counts and sums of rests of ``x``, of any shape, float32, bfloat16 or float16: int64 ``[2, 2, bins]``.

    The first index is 0 for counts and 1 for sums, the second 0 for positive values and 1 for those with a minus sign.
    """
    table = torch.zeros(2, 2 * _BINS, dtype=torch.int64, device=x.device)
    for piece in x.reshape(-1).split(_PIECE):
        bits = piece.to(torch.float32).view(torch.int32).to(torch.int64) & 0xFFFFFFFF
        place, rest = bits >> _REST_BITS, bits & 0xFFFF
        table.scatter_add_(1, torch.stack([place, place]), torch.stack([torch.ones_like(rest), rest]))
    return table.view(2, 2, _BINS)


def has_negative_bin(table: Tensor) -> Tensor:
    """Whether a tensor with this table has a value below zero: bool ``[]``. Minus zero is none."""
    counts, rests = table.select(1, 1)
    return (counts.narrow(0, 1, _BINS - 1).sum() + rests.select(0, 0)) > 0


def is_finite(table: Tensor) -> Tensor:
    """Whether no value is NaN or Inf: bool ``[]``."""
    return table.select(0, 0).narrow(1, _NOT_FINITE, _BINS - _NOT_FINITE).sum() == 0


class Tails:
    """Counts and excesses of the magnitudes of a grid, ``|x|`` or ``max(x, 0)``, above thresholds.

    A bin's values are spread over it by a density that is a line with their mean. But a single value, values with no
    rest, and what a bin has more than the two beside it if that is far more, such as those at the 6 of a ReLU6, are a
    crowd at one place. With an empty bin beside it the others are few.

    Args:
        table: from ``magnitude_table``, or the sum of those of a tensor's parts.
        signed: bool ``[]``; without a sign, negative values are zeros.

    Attributes:
        nonzero: count of all magnitudes, zeros left out, ``[]`` float64.
        edges: lower edges of the bins that matter, ascending, ``[bins]`` float64.
        top: the largest magnitude, as far as the table tells, ``[]`` float64.
    """

    def __init__(self, table: Tensor, signed: Tensor):
        numbers = torch.arange(_BINS, dtype=torch.int64, device=table.device)
        usable = (numbers > 0) & (numbers < _NOT_FINITE)  # bin 0 is zero, and less than 2^-133
        counts, rests = table * usable * torch.stack([torch.ones_like(signed), signed]).view(2, 1)
        self.nonzero = counts.sum().double()
        highest = (numbers * (counts > 0)).amax()
        self._first = (highest - (_WINDOW - 1)).clamp(min=1)
        # One bin more than those that can be filled, so that each has one above it.
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
        """Count of the magnitudes m above each threshold t >= 0, float64, any shape, and ``sum((m - t)+)``.

        Both are float64 ``[2, *shape]``, of positive values and of negative ones.
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
            function: of thresholds, ``[n]``, and the count and excess of the magnitudes above them: ``[n]``.
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
    """For each value the sum of those behind it in its row."""
    return values.flip(1).cumsum(1).flip(1) - values
