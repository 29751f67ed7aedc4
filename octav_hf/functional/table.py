"""The magnitude table: what octav, mse and percentile read off a tensor, once; they are functions of it.

Magnitudes are counted by the upper 16 bits of their float32 pattern, which are those of a bfloat16: 128 bins an octave,
each with the count of its values and the sum of their lower 16 bits, the rests. Both are integers, so a table does not
depend on the order of the values, and the tables of a tensor's parts add up to its own.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .kernels.operations import operation

LONG_ROW = 1 << 15
"""Elements from which a row's clip is a function of its table; that of a shorter one is exact."""
_BINS = 1 << 15
_NOT_FINITE = 255 << 7  # the first bin of Inf and NaN
_REST_BITS = 16
_PIECE = 1 << 20
_WINDOW = 32 * 128  # bins below the highest that matter: a clip is above max / (c N + 1)


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


def number_of_values(table: Tensor) -> Tensor:
    """The number of elements: int64 ``[]``."""
    return table[0].sum()


def is_finite(table: Tensor) -> Tensor:
    """Whether no value is NaN or Inf: bool ``[]``."""
    return table.select(0, 0).narrow(1, _NOT_FINITE, _BINS - _NOT_FINITE).sum() == 0


class Bin(NamedTuple):
    """Bins around thresholds, one for each; float64."""

    edge: Tensor  # lower one
    width: Tensor
    number: Tensor  # of its values
    mean: Tensor  # of their places, from 0 at the lower edge to 1
    crowded: Tensor  # values that are at one place
    place: Tensor  # of these
    count_above: Tensor  # in all higher bins
    excess_above: Tensor  # their sum less count_above times the upper edge


class Tails:
    """Counts and excesses of the magnitudes above thresholds.

    Args:
        table: from ``magnitude_table``.
        weights: of positive and of negative values, int64 ``[2]``, 0 or 1: which of them count.

    Attributes:
        nonzero: count of all magnitudes, zeros left out, ``[]`` float64.
        edges: lower edges of the bins that matter, ascending, ``[bins]`` float64.
    """

    def __init__(self, table: Tensor, weights: Tensor):
        counts, rests = (table * weights.view(2, 1)).sum(dim=1)
        numbers = torch.arange(_BINS, dtype=torch.int64, device=table.device)
        usable = (numbers > 0) & (numbers < _NOT_FINITE)  # bin 0 is zero, and less than 2^-133
        counts, rests = counts * usable, rests * usable
        self.nonzero = counts.sum().double()
        self._highest = (numbers * (counts > 0)).amax()
        self._first = (self._highest - (_WINDOW - 1)).clamp(min=1)
        # One bin more than those that can be filled, so that each has one above it.
        window = self._first + torch.arange(_WINDOW + 1, dtype=torch.int64, device=table.device)
        self.edges, upper = _edge(window), _edge(window + 1)
        self._widths = upper - self.edges
        counts, rests = (part.index_select(0, window.clamp(max=_BINS - 1)) for part in (counts, rests))
        self._counts = counts.double()
        self._means = rests.double() / (counts * 2**_REST_BITS).clamp(min=1)
        sums = self._counts * self.edges + self._counts * self._means * self._widths
        self._counts_above = _sum_above(self._counts)
        self._excesses_above = _sum_above(sums) - self._counts_above * upper

    @classmethod
    def of(cls, table: Tensor, signed: Tensor) -> "Tails":
        """Those of the magnitudes of a grid, ``|x|`` or ``max(x, 0)``; ``signed`` is bool ``[]``."""
        return cls(table, torch.stack([torch.ones_like(signed), signed]).to(torch.int64))

    @property
    def top(self) -> Tensor:
        """The largest magnitude, as far as the table tells, ``[]`` float64."""
        last = self.bin((self._highest - self._first).clamp(min=0))
        return torch.where(self.nonzero > 0, last.edge + last.width * torch.where(last.number > 1, 1, last.mean), 0)

    def bins(self, thresholds: Tensor) -> Bin:
        """The bins that hold ``thresholds``, >= 0, float64, any shape; the lowest or highest if none does."""
        bits = thresholds.to(torch.float32).view(torch.int32).to(torch.int64)
        return self.bin(((bits >> _REST_BITS) - self._first).clamp(0, _WINDOW))

    def at_edges(self) -> tuple[Tensor, Tensor]:
        """Count of the magnitudes that are not below each of the edges, and their excess above it."""
        counts = self._counts_above + self._counts
        inside = self._widths * (self._counts * self._means + self._counts_above)
        return counts, self._excesses_above + inside

    def bin(self, index: Tensor) -> Bin:
        """The bins above the edges of these numbers, int64, any shape."""

        def of(values: Tensor, index: Tensor = index) -> Tensor:
            return values.index_select(0, index.flatten()).reshape(index.shape)

        edge, width, count, mean = (of(part) for part in (self.edges, self._widths, self._counts, self._means))
        below, above = of(self._counts, (index - 1).clamp(min=0)), of(self._counts, (index + 1).clamp(max=_WINDOW))
        # A single value, values with no rest, and what a bin has more than the two beside it if that is far more, such
        # as those at the 6 of a ReLU6, are at one place. With an empty bin beside it the others are few.
        alone = (count == 1) | (mean == 0)
        smooth = torch.where(alone, 0.0, torch.minimum(below, above))
        crowded = torch.where(alone | (count > 2 * (below + above)), count - smooth, 0.0)
        place = ((count * mean - smooth / 2) / crowded.clamp(min=1)).clamp(0, 1)
        return Bin(edge, width, count, mean, crowded, place, of(self._counts_above), of(self._excesses_above))

    def magnitude_below(self, count: Tensor) -> Tensor:
        """The magnitude, ``[]`` float64, that has ``count`` values above it; 0 if there are no more."""
        index = ((self._counts_above > count).sum()).clamp(max=_WINDOW)
        within = self.bin(index)
        share = 1 - (count - within.count_above + 0.5) / within.number.clamp(min=1)
        # A density that is a power of the place, with the values' mean.
        power = share.clamp(0, 1) ** ((1 - within.mean) / within.mean.clamp(min=1e-9))
        place = torch.where(within.crowded * 2 > within.number, within.place, power)
        return torch.where(count < self.nonzero, within.edge + within.width * place, 0.0)

    def excess(self, thresholds: Tensor) -> Tensor:
        """``sum((m - t)+)`` over the magnitudes m, for each threshold t."""
        return self.excess_in(self.bins(thresholds), thresholds)

    @staticmethod
    def excess_in(b: Bin, thresholds: Tensor) -> Tensor:
        """``excess`` of thresholds in their bins: the values' density there is a line with their mean, or a point."""
        u = ((thresholds - b.edge) / b.width).clamp(0, 1)
        rest = 1 - u
        line = rest * rest * (0.5 + (b.mean - 0.5) * (1 + 2 * u))
        spread = b.number * torch.maximum(line, b.mean - u).clamp(min=0)
        point = (b.number - b.crowded) * rest * rest / 2 + b.crowded * (b.place - u).clamp(min=0)
        upper = b.edge + b.width
        inside = b.width * torch.where(b.crowded > 0, point, spread)
        return b.excess_above + b.count_above * (upper - thresholds) + inside

    @staticmethod
    def count_in(b: Bin, thresholds: Tensor) -> Tensor:
        """Count of the magnitudes above thresholds in their bins."""
        u = ((thresholds - b.edge) / b.width).clamp(0, 1)
        spread = b.number * ((1 - u) * (1 + 6 * u * (b.mean - 0.5))).clamp(0, 1)
        point = (b.number - b.crowded) * (1 - u) + b.crowded * (u < b.place)
        return b.count_above + torch.where(b.crowded > 0, point, spread)


def _edge(number: Tensor) -> Tensor:
    """Lower edges of bins, float64; that of the first bin that is not finite is 2^128."""
    edges = (number << _REST_BITS).to(torch.int32).view(torch.float32).double()
    return torch.where(number < _NOT_FINITE, edges, 2.0**128)


def _sum_above(values: Tensor) -> Tensor:
    """For each value the sum of those behind it."""
    return values.flip(0).cumsum(0).flip(0) - values
