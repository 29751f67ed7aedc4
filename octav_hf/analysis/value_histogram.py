"""A histogram of values whose range is not known beforehand, counted on the device."""

from dataclasses import dataclass

import torch
from torch import Tensor

_BINS = 1 << 14  # of equal width, half of them for negative values
_SHOWN = 128  # maximum number of returned bins, without the tails
_SMALLEST_RANGE = 2.0**-200


@dataclass(frozen=True)
class Histogram:
    """Numbers of values between neighbouring edges.

    Attributes:
        edges: ascending, one more than counts, in units of the operand; evenly spaced, except that the first and the
            last bin may be wider: they then hold a tail, up to the lowest or the highest value.
        counts: numbers of values from one edge, which is included, to the next.
    """

    edges: tuple[float, ...]
    counts: tuple[int, ...]


class ValueHistogram:
    """Counts values in bins of equal width from ``-2^e`` to ``2^e``. When e grows, neighbouring bins are merged.

    Args:
        device: device of the values.
    """

    def __init__(self, device: torch.device):
        self._counts = torch.zeros(_BINS, dtype=torch.int64, device=device)
        self._range = torch.full((), _SMALLEST_RANGE, dtype=torch.float64, device=device)  # 2^e

    def add(self, x: Tensor) -> None:
        """Count ``x``, floating point, any shape, not empty and finite, without reading from the device."""
        x, half = x.detach().double().flatten(), _BINS // 2
        peak = x.abs().amax()
        power = peak / torch.frexp(peak).mantissa  # the next power of two, without rounding; NaN for 0
        larger = torch.maximum(self._range, power.nan_to_num(nan=0.0))
        doublings = torch.frexp(larger / self._range).exponent - 1
        bins = torch.arange(_BINS, dtype=torch.int64, device=x.device) - half
        merged = bins.bitwise_right_shift(doublings.long().clamp(max=62)) + half
        counts = torch.zeros_like(self._counts).index_add(0, merged, self._counts)
        index = (x / larger * half).floor().long().add_(half).clamp_(0, _BINS - 1)
        one = torch.ones((), dtype=torch.int64, device=x.device)
        self._counts, self._range = counts.scatter_add(0, index, one.expand_as(index)), larger

    def read(self, lowest: float, highest: float, within: float) -> Histogram:
        """Even bins over the values from ``-within`` to ``within``, and the tails beyond.

        Args:
            lowest, highest: minimum and maximum of the values.
            within: above 0, in units of the operand.
        """
        counts, width, half = self._counts.cpu(), float(self._range) * 2 / _BINS, _BINS // 2
        first, last = (int(max(-within, min(within, end)) // width) for end in (lowest, highest))
        merged = 1
        while last // merged - first // merged >= _SHOWN:
            merged *= 2
        start, stop = first // merged * merged, (last // merged + 1) * merged  # of the bins, counted from 0
        start, stop = max(start, -half), min(stop, half)
        inner = counts[start + half : stop + half].view(-1, merged).sum(dim=1).tolist()
        edges = [(start + number * merged) * width for number in range(len(inner) + 1)]
        below, above = int(counts[: start + half].sum()), int(counts[stop + half :].sum())
        if below:
            edges, inner = [lowest, *edges], [below, *inner]
        if above:
            edges, inner = [*edges, highest], [*inner, above]
        return Histogram(tuple(edges), tuple(inner))
