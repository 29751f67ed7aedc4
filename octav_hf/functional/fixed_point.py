"""The fixed point of Eq. 6 in few reads of a large tensor or of its rows, on any device."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .error import lower_error
from .grid import gaussian_clip, noise_factor
from .kernels import cuda
from .rows import magnitude

MIN_NUMEL = 1 << 15  # elements from which the search is worth its overhead
_LONG_ROW = 1 << 15  # elements of a row that is searched; on shorter ones, which stay in cache, Eq. 6 is run
_PIECE = 1 << 12  # elements summed in float32, for a relative error of 1e-5 at worst, before float64 sums over pieces
_PIECES_IN_CACHE = 64  # processed at once, so that temporaries stay in cache
_LARGE = 1 << 19  # elements from which reads are expensive: start from a sample's clip, stop at a larger tolerance
_TOLERANCE, _LARGE_TOLERANCE = 1e-6, 5e-5
_MAX_READS = 12
_ROW_UPDATES = 7


def is_worthwhile(x: Tensor) -> bool:
    """Whether ``fixed_points`` is fast for ``x``, and precise enough with its float32 arithmetic."""
    return x.numel() >= MIN_NUMEL and x.dtype != torch.float64


def fixed_points(rows: Tensor, num_bits: int, signed: bool) -> Tensor:
    """The fixed point of Eq. 6 for each row, where it can be proven.

    Args:
        rows: float32, bfloat16 or float16, ``[rows, n]`` with n > 0.
        num_bits, signed: the grid.

    Returns:
        Clips, float32 ``[rows]``; NaN for rows that make Eq. 6 cycle, are all zero or not finite, or whose sum
        overflows.
    """
    rows = rows.contiguous()
    if rows.shape[1] < _LONG_ROW:
        return _short_rows(rows, num_bits, signed)
    noise = noise_factor(num_bits, signed)
    clips = [_long_row(row, noise, signed) or math.nan for row in rows]
    return torch.tensor(clips, dtype=torch.float32, device=rows.device)


def _long_row(x: Tensor, noise: float, signed: bool) -> float | None:
    r"""The fixed point of Eq. 6 for ``x``, ``[n]`` with n >= ``_PIECE``, to a proven tolerance; ``None`` if not found.

    The derivative of the modelled error, :math:`h(s) = c s \sum 1\{0<|x|\le s\} - \sum (|x|-s)_+`, increases with s and
    is zero at the fixed point. Between two thresholds a < b its slope lies between D(b) and D(a), where
    :math:`D(s) = c \sum 1\{0<|x|\le s\} + \sum 1\{|x|>s\}` is the denominator of Eq. 6, except for a jump by
    :math:`c m` at each magnitude m between them. So the sums and counts above a and b bound the zero from both sides.
    With a and b around the fixed point of a sample, two reads of the tensor usually suffice.
    """
    magnitudes = _Magnitudes(x, noise, signed)
    tail = magnitudes.tail(_guess(_sample(x) if x.numel() >= _LARGE else x, noise, signed))
    if not math.isfinite(magnitudes.total) or magnitudes.nonzero == 0:
        return None
    return _search(magnitudes, tail)


def _sample(x: Tensor) -> Tensor:
    """One in 16 elements."""
    return x[: x.numel() // _PIECE * _PIECE].view(-1, _PIECE)[:, : _PIECE // 16].reshape(-1)


def _guess(x: Tensor, noise: float, signed: bool) -> float:
    """A clip near the fixed point, or 0."""
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
    """The magnitudes of ``x``, ``[n]``, and their tails above thresholds, which are rounded to float32.

    ``tail`` sets ``total``, the sum of ``|x|``, and ``nonzero``, the count of the nonzero magnitudes.
    """

    def __init__(self, x: Tensor, noise: float, signed: bool):
        self.noise = noise
        self.numel = x.numel()
        self._x = x
        self._signed = signed

    def tail(self, threshold: float) -> _Tail:
        (threshold,), sums = self._read([threshold])
        self.total, self.nonzero, total, outside = sums
        return _Tail(threshold, total, outside)

    def tails(self, low: float, high: float) -> tuple[_Tail, _Tail]:
        (low, high), sums = self._read([low, high])
        return _Tail(low, sums[0], sums[1]), _Tail(high, sums[2], sums[3])

    def slope(self, tail: _Tail) -> float:
        """D at the threshold, the denominator of Eq. 6."""
        return self.noise * (self.nonzero - tail.outside) + tail.outside

    def update(self, tail: _Tail) -> float:
        """Eq. 6 from the threshold; the mean, as after its value 0, if there is nothing above."""
        if tail.outside == 0:
            return self.total / max(self.nonzero, 1.0)
        return tail.total / self.slope(tail)

    def derivative(self, tail: _Tail) -> float:
        """h at the threshold, the derivative of the modelled error."""
        return tail.threshold * self.slope(tail) - tail.total

    def _read(self, thresholds: list[float]) -> tuple[list[float], list[float]]:
        rounded = torch.tensor(thresholds, dtype=torch.float32, device="cpu")
        read = cuda.sums if cuda.is_supported(self._x) else _sums
        sums = read(self._x, rounded.to(self._x.device), self._signed)
        return rounded.tolist(), sums.double().sum(dim=1).tolist()


def _sums(x: Tensor, thresholds: Tensor, signed: bool) -> Tensor:
    """As ``cuda.sums``, by torch operations."""
    whole = x.numel() // _PIECE * _PIECE
    parts = [*x[:whole].view(-1, _PIECE).split(_PIECES_IN_CACHE), x[whole:].view(1, -1)]
    return torch.cat([_sums_of_rows(part, thresholds, signed) for part in parts if part.numel()], dim=1)


def _sums_of_rows(rows: Tensor, thresholds: Tensor, signed: bool) -> Tensor:
    values = rows.to(torch.float32)
    magnitudes = values.abs() if signed else values  # no max(x, 0): thresholds are never negative
    sums = [part for threshold in thresholds for part in _tail(magnitudes, threshold)]
    if len(thresholds) == 1:
        sums = [values.abs().sum(dim=1), _count(magnitudes > 0), *sums]
    return torch.stack(sums)


def _tail(magnitudes: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
    """Sum and count of the magnitudes, ``[rows, n]``, above a threshold; ``[rows]`` each."""
    outside = magnitudes > threshold
    return torch.where(outside, magnitudes, 0.0).sum(dim=1), _count(outside)


def _count(condition: Tensor) -> Tensor:
    return condition.to(torch.float32).sum(dim=1)


def _search(magnitudes: _Magnitudes, tail: _Tail) -> float | None:
    """The fixed point, by brackets that close around it, starting from an update of ``tail``."""
    tolerance = _LARGE_TOLERANCE if magnitudes.numel >= _LARGE else _TOLERANCE
    clip = magnitudes.update(tail)
    spread = _error(clip, tail)
    for _ in range(_MAX_READS):
        spread = min(max(spread, 1e-6), 0.5)
        below, above = magnitudes.tails(clip * (1 - spread), clip * (1 + spread))
        if not below.threshold < above.threshold:
            return None  # equal in float32, for subnormal numbers
        h_below, h_above = magnitudes.derivative(below), magnitudes.derivative(above)
        if not h_below <= 0 <= h_above:
            tail = below if h_below > 0 else above
            clip = magnitudes.update(tail)
            spread = _error(clip, tail)
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
    """The zero of a parabola through (a, h_a) and (b, h_b) whose slope changes by ``slope_b - slope_a`` between."""
    width, mean_slope = b - a, (h_b - h_a) / (b - a)
    bend = (slope_b - slope_a) / width
    chord = -h_a / mean_slope
    return a + chord - bend / 2 * chord * (chord - width) / (mean_slope + bend * (chord - width / 2))


def _error(clip: float, tail: _Tail) -> float:
    """A generous estimate of an update's relative error: Eq. 6 converges quadratically at first, then linearly."""
    change = abs(clip / tail.threshold - 1) if tail.threshold else 1.0
    return 16 * change**2 + 0.03 * change


def _short_rows(rows: Tensor, num_bits: int, signed: bool) -> Tensor:
    before, clip, last = _updates(rows, noise_factor(num_bits, signed), signed)
    tolerance = 8 * torch.finfo(clip.dtype).eps * clip
    settled = (last - clip).abs() <= tolerance
    # About one weight row in a hundred alternates, too many for the recursion's slow path.
    alternates = ((last - before).abs() <= tolerance) & ~settled
    if alternates.any():
        part, first, second = rows[alternates], clip[alternates], last[alternates]
        last[alternates] = lower_error(part, first, second, num_bits, signed)
        settled[alternates] = _one_magnitude_between(magnitude(part, signed), first, second)
    return torch.where(settled, last, math.nan)


def _updates(rows: Tensor, noise: float, signed: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The last three of a few updates of Eq. 6 for each row, ``[rows]``; NaN where undefined."""
    if cuda.is_supported(rows):
        return cuda.row_updates(rows, noise, gaussian_clip(noise), signed)
    parts = rows.split(max(1, _PIECE * _PIECES_IN_CACHE // rows.shape[1]))
    updated = (_row_updates(part, noise, gaussian_clip(noise), signed) for part in parts)
    before, clip, last = (torch.cat(values) for values in zip(*updated, strict=True))
    return before, clip, last


def _one_magnitude_between(magnitudes: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Whether all magnitudes between two clips of a row are equal, so that h jumps over zero there."""
    low, high = torch.minimum(first, second)[:, None], torch.maximum(first, second)[:, None]
    between = (magnitudes > low) & (magnitudes <= high)
    smallest = torch.where(between, magnitudes, torch.inf).amin(dim=1)
    return smallest == torch.where(between, magnitudes, 0).amax(dim=1)


def _row_updates(rows: Tensor, noise: float, start: float, signed: bool) -> tuple[Tensor, Tensor, Tensor]:
    magnitudes = magnitude(rows, signed)
    nonzero = _count(magnitudes > 0)
    # Above every magnitude Eq. 6 would start over from 0.
    highest = magnitudes.amax(dim=1) * (1 - 2.0**-20)
    clips = [torch.minimum(start * magnitudes.sum(dim=1) / nonzero, highest)]
    if not signed:  # a negative infinity is no magnitude
        clips[0] = torch.where(rows.amin(dim=1) > -torch.inf, clips[0], torch.nan)
    for _ in range(_ROW_UPDATES):
        total, outside = _tail(magnitudes, clips[-1][:, None])
        clip = total / (noise * (nonzero - outside) + outside)
        clips.append(torch.where(outside > 0, clip, torch.nan))
    return clips[-3], clips[-2], clips[-1]
