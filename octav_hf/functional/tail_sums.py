"""Sum and count of the magnitudes above a threshold: the statistics that Eq. 6 needs."""

from collections.abc import Iterable

import torch
from torch import Tensor

from .all_ranks import AllRanks
from .rows import magnitude, statistics_dtype

# Elements a piece: small enough that a CPU keeps its temporaries in cache and in memory it has used before, which makes
# a pass over a large tensor several times cheaper.
_CPU_PIECE = 1 << 18


class TailSums:
    """Statistics of ``rows``, ``[rows, n]``, whose values are finite and lie from ``low`` to ``high``.

    ``longest`` is the number of elements that a sum will have in the end, where that is more than n; n must not be 0
    without it.

    Attributes:
        total: sum of the magnitudes in ``unit``, ``[rows]``, float32 or better.
        nonzero: count of the nonzero magnitudes, ``[rows]``, same dtype.
        unit: what magnitudes, and so thresholds, are multiplied by: 1, or the power of two (which is exact) that keeps
            a sum finite where n of the largest values would overflow.
    """

    def __init__(self, rows: Tensor, signed: bool, low: float, high: float, longest: int = 0):
        count, length = rows.shape
        longest = max(length, longest)
        dtype = statistics_dtype(rows.dtype)
        self.unit = 1.0 if max(-low, high) <= torch.finfo(dtype).max / longest else 2.0 ** -longest.bit_length()
        # The pieces of a single row add up; those of many rows are rows of their own.
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
        """Sum and count of the magnitudes greater than ``threshold``; all three ``[rows]``, in ``unit``."""
        lengths = [piece.shape[0] for piece in self._pieces]
        thresholds = [threshold] * len(lengths) if self._of_one_row else threshold.split(lengths)
        sums, counts = [], []
        for piece, level in zip(self._pieces, thresholds, strict=True):
            # By arithmetic on floats, which a CPU does far faster than comparisons and masks.
            excess = (piece - level[:, None]).relu_()
            excess_sum = excess.sum(dim=1)
            counts.append(excess.sign_().sum(dim=1))
            sums.append(excess_sum + level * counts[-1])
        return self._join(sums), self._join(counts)

    def _join(self, parts: Iterable[Tensor]) -> Tensor:
        return torch.stack(list(parts)).sum(dim=0) if self._of_one_row else torch.cat(list(parts))


class TailSumsOfAllRanks(TailSums):
    """``TailSums`` of one row, ``[1, n]``, of which each rank has the part ``rows``, perhaps an empty one.

    To make one and to call ``above`` are collectives.

    Args:
        guess: a number of this rank's, ``[]``.

    Attributes:
        guess: its mean over all ranks, weighted by their numbers of elements, ``[1]``.
    """

    def __init__(self, rows: Tensor, signed: bool, ranks: AllRanks, guess: Tensor | None = None):
        super().__init__(rows, signed, ranks.low, ranks.high, longest=ranks.numel)
        self._ranks = ranks
        share = rows.numel() / max(ranks.numel, 1)
        weighted = torch.zeros_like(self.total) if guess is None else guess.reshape(1) * share
        self.total, self.nonzero, self.guess = ranks.sum(torch.stack([self.total, self.nonzero, weighted]))

    def above(self, threshold: Tensor) -> tuple[Tensor, Tensor]:
        """As in ``TailSums``, of all ranks."""
        total, count = self._ranks.sum(torch.stack(super().above(threshold)))
        return total, count
