"""The fixed point of Eq. 6 in few reads of a large tensor, for the whole of it or for its rows, on any device."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .error import lower_error
from .grid import gaussian_clip, noise_factor
from .kernels import cuda
from .rows import magnitude

# Elements from which the search is worth its overhead.
MIN_NUMEL = 1 << 15
# Elements from which a row is searched by itself; shorter ones stay in cache while Eq. 6 is run on all of them.
_LONG_ROW = 1 << 15
# Elements summed in float32, before the sums of such pieces are summed in float64: few enough for 1e-5 at the worst.
_PIECE = 1 << 12
# Pieces that torch operations take at once: few enough that their temporaries stay in cache.
_PIECES_IN_CACHE = 64
# From so many elements on a read is dear: the search starts from a sample's clip, and ends when it is proven to 5e-5.
_LARGE = 1 << 19
_TOLERANCE, _LARGE_TOLERANCE = 1e-6, 5e-5
_MOST_READS = 12
_ROW_UPDATES = 7


def is_worthwhile(x: Tensor) -> bool:
    """Whether ``fixed_points`` is worth its overhead for ``x``, and its float32 arithmetic as good as it can be."""
    return x.numel() >= MIN_NUMEL and x.dtype != torch.float64


def fixed_points(rows: Tensor, num_bits: int, signed: bool) -> Tensor:
    """The fixed point of Eq. 6 for each of ``rows``, ``[rows, n]``, where there is one that can be proven.

    Args:
        rows: float32, bfloat16 or float16, ``[rows, n]`` with n > 0.
        num_bits, signed: the grid.

    Returns:
        Clips, float32 ``[rows]``; NaN for rows on which Eq. 6 runs in a cycle, or that are all zero, not finite, or too
        large to be summed up.
    """
    rows = rows.contiguous()
    if rows.shape[1] < _LONG_ROW:
        return _short_rows(rows, num_bits, signed)
    noise = noise_factor(num_bits, signed)
    clips = [_long_row(row, noise, signed) or math.nan for row in rows]
    return torch.tensor(clips, dtype=torch.float32, device=rows.device)


def _long_row(x: Tensor, noise: float, signed: bool) -> float | None:
    r"""The fixed point of Eq. 6 for ``x``, ``[n]`` with n of at least ``_PIECE``, proven to within a tolerance.

    The derivative of the modelled error, :math:`h(s) = c s \sum 1\{0<|x|\le s\} - \sum (|x|-s)_+`, increases with s and
    is zero at the fixed point. Between two thresholds a < b its slope lies between D(b) and D(a), where
    :math:`D(s) = c \sum 1\{0<|x|\le s\} + \sum 1\{|x|>s\}` is the denominator of Eq. 6, but for a jump by
    :math:`c m` at each magnitude m between them. So the sums and counts above a and b bound the zero from both sides.
    The fixed point of a sample says where to put a and b: two reads of the tensor are the rule.

    Returns ``None`` where it was not found.
    """
    magnitudes = _Magnitudes(x, noise, signed)
    tail = magnitudes.tail(_guess(_sample(x) if x.numel() >= _LARGE else x, noise, signed))
    if not math.isfinite(magnitudes.total) or magnitudes.nonzero == 0:
        return None
    return _search(magnitudes, tail)


def _sample(x: Tensor) -> Tensor:
    """One element in 16, in runs."""
    return x[: x.numel() // _PIECE * _PIECE].view(-1, _PIECE)[:, : _PIECE // 16].reshape(-1)


def _guess(x: Tensor, noise: float, signed: bool) -> float:
    """A clip near the fixed point; 0 where there is nothing to go by."""
    if x.numel() < _LARGE:
        clip = _updates(x[None], noise, signed)[-1].item()
    else:
        clip = _guess(_sample(x), noise, signed)
        magnitudes = _Magnitudes(x, noise, signed)
        for _ in range(2):
            clip = magnitudes.update(magnitudes.tail(clip))
    return clip if math.isfinite(clip) else 0.0


class _Tail(NamedTuple):
    """Sum and count of the magnitudes above a threshold."""

    threshold: float
    total: float
    outside: float


class _Magnitudes:
    """The magnitudes of ``x``, ``[n]``, read for the tails above one or two thresholds, which are rounded to float32.

    ``total`` and ``nonzero``, the sum of ``|x|`` and the count of the nonzero magnitudes, are known after ``tail``.
    """

    def __init__(self, x: Tensor, noise: float, signed: bool):
        self.noise = noise
        self.numel = x.numel()
        self._x = x
        self._signed = signed

    def tail(self, threshold: float) -> _Tail:
        """What is above one threshold; also sets ``total`` and ``nonzero``."""
        (threshold,), sums = self._read([threshold])
        self.total, self.nonzero, total, outside = sums
        return _Tail(threshold, total, outside)

    def tails(self, low: float, high: float) -> tuple[_Tail, _Tail]:
        """What is above each of two thresholds."""
        (low, high), sums = self._read([low, high])
        return _Tail(low, sums[0], sums[1]), _Tail(high, sums[2], sums[3])

    def slope(self, tail: _Tail) -> float:
        """D at the threshold, the denominator of Eq. 6."""
        return self.noise * (self.nonzero - tail.outside) + tail.outside

    def update(self, tail: _Tail) -> float:
        """Eq. 6 from the threshold. Above every magnitude that is 0, and from there the mean, which it is at once."""
        if tail.outside == 0:
            return self.total / max(self.nonzero, 1.0)
        return tail.total / self.slope(tail)

    def derivative(self, tail: _Tail) -> float:
        """h at the threshold, the derivative of the modelled error."""
        return tail.threshold * self.slope(tail) - tail.total

    def _read(self, thresholds: list[float]) -> tuple[list[float], list[float]]:
        rounded = torch.tensor(thresholds, dtype=torch.float32)
        read = cuda.sums if cuda.is_supported(self._x) else _sums
        sums = read(self._x, rounded.to(self._x.device), self._signed)
        return rounded.tolist(), sums.double().sum(dim=1).tolist()


def _sums(x: Tensor, thresholds: Tensor, signed: bool) -> Tensor:
    """Sums over each piece of ``x``, ``[n]``: float32 ``[4, pieces]``.

    With one threshold the sum of ``|x|``, the count of nonzero magnitudes, and the sum and count above it; with two the
    sum and count above each.
    """
    whole = x.numel() // _PIECE * _PIECE
    parts = [*x[:whole].view(-1, _PIECE).split(_PIECES_IN_CACHE), x[whole:].view(1, -1)]
    return torch.cat([_sums_of_rows(part, thresholds, signed) for part in parts if part.numel()], dim=1)


def _sums_of_rows(rows: Tensor, thresholds: Tensor, signed: bool) -> Tensor:
    values = rows.to(torch.float32)
    # A tail does not need max(x, 0), for no threshold is negative.
    magnitudes = values.abs() if signed else values
    sums = [part for threshold in thresholds for part in _tail(magnitudes, threshold)]
    if len(thresholds) == 1:
        sums = [values.abs().sum(dim=1), _count(magnitudes > 0), *sums]
    return torch.stack(sums)


def _tail(magnitudes: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
    """Sum and count of the magnitudes above a threshold, which broadcasts against ``[rows, n]``; ``[rows]`` each."""
    outside = magnitudes > threshold
    return torch.where(outside, magnitudes, 0.0).sum(dim=1), _count(outside)


def _count(condition: Tensor) -> Tensor:
    """How often it holds in each row."""
    return torch.where(condition, 1.0, 0.0).to(torch.float32).sum(dim=1)


def _search(magnitudes: _Magnitudes, tail: _Tail) -> float | None:
    """The fixed point, from an update of ``tail`` on, by brackets that close around it."""
    tolerance = _LARGE_TOLERANCE if magnitudes.numel >= _LARGE else _TOLERANCE
    clip = magnitudes.update(tail)
    spread = _error(clip, tail)
    for _ in range(_MOST_READS):
        spread = min(max(spread, 1e-6), 0.5)
        below, above = magnitudes.tails(clip * (1 - spread), clip * (1 + spread))
        if not below.threshold < above.threshold:
            return None  # subnormal, where float32 cannot tell them apart
        h_below, h_above = magnitudes.derivative(below), magnitudes.derivative(above)
        if not h_below <= 0 <= h_above:
            nearer = below if h_below > 0 else above
            clip = magnitudes.update(nearer)
            spread = _error(clip, nearer)
            continue
        jumps = magnitudes.noise * above.threshold * (below.outside - above.outside)
        steepest, flattest = magnitudes.slope(below), magnitudes.slope(above)
        lowest = max(below.threshold + max(0.0, -h_below - jumps) / steepest, above.threshold - h_above / flattest)
        highest = min(above.threshold - max(0.0, h_above - jumps) / steepest, below.threshold - h_below / flattest)
        clip = min(max(_zero(below.threshold, above.threshold, h_below, h_above, steepest, flattest), lowest), highest)
        if highest - lowest <= tolerance * clip:
            return clip
        spread = min(spread / 4, 32 * spread**2)
    return None


def _zero(a: float, b: float, h_a: float, h_b: float, slope_a: float, slope_b: float) -> float:
    """Where a parabola through (a, h_a) and (b, h_b) is zero whose slope changes by ``slope_b - slope_a`` between."""
    width, mean_slope = b - a, (h_b - h_a) / (b - a)
    bend = (slope_b - slope_a) / width
    chord = -h_a / mean_slope
    return a + chord - bend / 2 * chord * (chord - width) / (mean_slope + bend * (chord - width / 2))


def _error(clip: float, tail: _Tail) -> float:
    """A generous guess at the relative error of an update: Eq. 6 converges quadratically at first, then linearly."""
    change = abs(clip / tail.threshold - 1) if tail.threshold else 1.0
    return 16 * change**2 + 0.03 * change


def _short_rows(rows: Tensor, num_bits: int, signed: bool) -> Tensor:
    """``fixed_points`` for rows shorter than ``_LONG_ROW``."""
    before, clip, last = _updates(rows, noise_factor(num_bits, signed), signed)
    tolerance = 8 * torch.finfo(clip.dtype).eps * clip
    settled = (last - clip).abs() <= tolerance
    # About one weight row in a hundred alternates: too many to leave to the recursion.
    alternates = ((last - before).abs() <= tolerance) & ~settled
    if alternates.any():
        part, first, second = rows[alternates], clip[alternates], last[alternates]
        last[alternates] = lower_error(part, first, second, num_bits, signed)
        settled[alternates] = _one_magnitude_between(magnitude(part, signed), first, second)
    return torch.where(settled, last, math.nan)


def _updates(rows: Tensor, noise: float, signed: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The last three of a few updates of Eq. 6 for each of ``rows``, ``[rows]``; NaN where there is none."""
    if cuda.is_supported(rows):
        return cuda.row_updates(rows, noise, gaussian_clip(noise), signed)
    parts = rows.split(max(1, _PIECE * _PIECES_IN_CACHE // rows.shape[1]))
    updated = (_row_updates(part, noise, gaussian_clip(noise), signed) for part in parts)
    before, clip, last = (torch.cat(values) for values in zip(*updated, strict=True))
    return before, clip, last


def _one_magnitude_between(magnitudes: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Whether all magnitudes of a row between two clips are equal: h jumps over zero there, and has no other zero."""
    low, high = torch.minimum(first, second)[:, None], torch.maximum(first, second)[:, None]
    between = (magnitudes > low) & (magnitudes <= high)
    smallest = torch.where(between, magnitudes, torch.inf).amin(dim=1)
    return smallest == torch.where(between, magnitudes, 0).amax(dim=1)


def _row_updates(rows: Tensor, noise: float, start: float, signed: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Updates of Eq. 6 from ``start`` times the mean: the last three clips; NaN where there is none."""
    magnitudes = magnitude(rows, signed)
    nonzero = _count(magnitudes > 0)
    # From above every magnitude Eq. 6 would start over from 0.
    highest = magnitudes.amax(dim=1) * (1 - 2.0**-20)
    clips = [torch.minimum(start * magnitudes.sum(dim=1) / nonzero, highest)]
    if not signed:  # a negative infinity is no magnitude
        clips[0] = torch.where(rows.amin(dim=1) > -torch.inf, clips[0], torch.nan)
    for _ in range(_ROW_UPDATES):
        total, outside = _tail(magnitudes, clips[-1][:, None])
        clip = total / (noise * (nonzero - outside) + outside)
        clips.append(torch.where(outside > 0, clip, torch.nan))
    return clips[-3], clips[-2], clips[-1]
