"""Sum and count of the magnitudes above a threshold: the statistics that Eq. 6 needs."""

from collections.abc import Iterable

import torch
from torch import Tensor

from .rows import magnitude, statistics_dtype

# Elements a piece: small enough that a CPU keeps its temporaries in cache and in memory it has used before, which makes
# a pass over a large tensor several times cheaper.
_CPU_PIECE = 1 << 18


class TailSums:
    """Statistics of ``rows``, ``[rows, n]`` with ``n > 0``, of finite values with magnitudes up to ``peak``.

    Attributes:
        total: sum of the magnitudes in ``unit``, ``[rows]``, float32 or better.
        nonzero: count of the nonzero magnitudes, ``[rows]``, same dtype.
        unit: what magnitudes, and so thresholds, are multiplied by: 1, or the power of two (which is exact) that keeps
            a sum finite where n of the largest values would overflow.
    """

    def __init__(self, rows: Tensor, signed: bool, peak: float):
        count, length = rows.shape
        largest = torch.finfo(statistics_dtype(rows.dtype)).max
        self.unit = 1.0 if peak <= largest / length else 2.0 ** -length.bit_length()
        self._signed = signed
        if rows.device.type != "cpu":
            self._pieces: tuple[Tensor, ...] = (rows,)
        elif count == 1:
            self._pieces = rows.split(_CPU_PIECE, dim=1)
        else:
            self._pieces = rows.split(max(1, _CPU_PIECE // length), dim=0)
        # The pieces of a single row add up; those of many rows are rows of their own.
        self._of_one_row = count == 1
        self.total = self._join(self._magnitude(piece).sum(dim=1) for piece in self._pieces)
        self.nonzero = self._join(magnitude(piece, signed).sign_().sum(dim=1) for piece in self._pieces)

    def above(self, threshold: Tensor) -> tuple[Tensor, Tensor]:
        """Sum and count of the magnitudes greater than ``threshold``; all three ``[rows]``, in ``unit``."""
        lengths = [piece.shape[0] for piece in self._pieces]
        thresholds = [threshold] * len(lengths) if self._of_one_row else threshold.split(lengths)
        sums, counts = [], []
        for piece, level in zip(self._pieces, thresholds, strict=True):
            # By arithmetic on floats, which a CPU does far faster than comparisons and masks.
            excess = (self._magnitude(piece) - level[:, None]).relu_()
            excess_sum = excess.sum(dim=1)
            counts.append(excess.sign_().sum(dim=1))
            sums.append(excess_sum + level * counts[-1])
        return self._join(sums), self._join(counts)

    def _magnitude(self, piece: Tensor) -> Tensor:
        values = magnitude(piece, self._signed)
        return values if self.unit == 1 else values * self.unit

    def _join(self, parts: Iterable[Tensor]) -> Tensor:
        return torch.stack(list(parts)).sum(dim=0) if self._of_one_row else torch.cat(list(parts))
