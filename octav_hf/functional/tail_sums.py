"""Sum and count of the magnitudes above a threshold, as in Eq. 6."""

from collections.abc import Iterable

import torch
from torch import Tensor

from .all_ranks import AllRanks
from .rows import magnitude, statistics_dtype

# Elements per piece: few enough that temporaries stay in the CPU's cache, which makes a pass several times cheaper.
_CPU_PIECE = 1 << 18


class TailSums:
    """Statistics of ``rows``, ``[rows, n]``, with finite values from ``low`` to ``high``.

    Args:
        longest: number of elements of a sum if more than n, which may then be 0.

    Attributes:
        total: sum of the magnitudes times ``unit``, ``[rows]``, float32 or better.
        nonzero: count of the nonzero magnitudes, ``[rows]``, same dtype.
        unit: factor on magnitudes and thresholds: 1, or a power of two that keeps the sum from overflowing.
    """

    def __init__(self, rows: Tensor, signed: bool, low: float, high: float, longest: int = 0):
        count, length = rows.shape
        longest = max(length, longest)
        dtype = statistics_dtype(rows.dtype)
        self.unit = 1.0 if max(-low, high) <= torch.finfo(dtype).max / longest else 2.0 ** -longest.bit_length()
        # A single row is split into pieces that add up; several rows are split into groups of rows.
        self._of_one_row = count == 1
        if rows.device.type != "cpu":
            pieces: tuple[Tensor, ...] = (rows,)
        elif self._of_one_row:
            pieces = rows.split(_CPU_PIECE, dim=1)
        else:
            pieces = rows.split(max(1, _CPU_PIECE // length), dim=0)
        if low < 0 or rows.dtype != dtype:
            pieces = tuple(magnitude(piece, signed) for piece in pieces)
        self.nonzero = self._join(piece.sign().sum(dim=1) for piece in pieces)
        self._pieces = pieces if self.unit == 1 else tuple(piece * self.unit for piece in pieces)
        self.total = self._join(piece.sum(dim=1) for piece in self._pieces)

    def above(self, threshold: Tensor) -> tuple[Tensor, Tensor]:
        """Sum and count of the magnitudes above ``threshold``; all ``[rows]``, scaled by ``unit``."""
        lengths = [piece.shape[0] for piece in self._pieces]
        thresholds = [threshold] * len(lengths) if self._of_one_row else threshold.split(lengths)
        sums, counts = [], []
        for piece, level in zip(self._pieces, thresholds, strict=True):
            # On a CPU float arithmetic is far faster than comparisons and masks.
            excess = (piece - level[:, None]).relu_()
            excess_sum = excess.sum(dim=1)
            counts.append(excess.sign_().sum(dim=1))
            sums.append(excess_sum + level * counts[-1])
        return self._join(sums), self._join(counts)

    def _join(self, parts: Iterable[Tensor]) -> Tensor:
        return torch.stack(list(parts)).sum(dim=0) if self._of_one_row else torch.cat(list(parts))


class TailSumsOfAllRanks(TailSums):
    """``TailSums`` of one row distributed over the ranks, whose part ``rows``, ``[1, n]``, may be empty.

    The constructor and ``above`` are collectives. The attribute ``guess``, ``[1]``, is the mean of the ranks' arguments
    of that name, weighted by their numbers of elements.
    """

    def __init__(self, rows: Tensor, signed: bool, ranks: AllRanks, guess: Tensor | float = 0.0):
        super().__init__(rows, signed, ranks.low, ranks.high, longest=ranks.numel)
        self._ranks = ranks
        weighted = torch.zeros_like(self.total) + guess * (rows.numel() / max(ranks.numel, 1))
        self.total, self.nonzero, self.guess = ranks.sum(torch.stack([self.total, self.nonzero, weighted]))

    def above(self, threshold: Tensor) -> tuple[Tensor, Tensor]:
        total, count = self._ranks.sum(torch.stack(super().above(threshold)))
        return total, count
