"""The paper's measurements of a tensor's clips: errors, times, the recursion of Eq. 6, second minima of the error."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from clip_measurements.tensors import SeenTensor
from octav_hf.functional import integer_range, max_clip, mse_sweep_clip, octav_clip, quantization_error, step_size
from octav_hf.functional.grid import noise_factor
from octav_hf.functional.rows import magnitude, to_rows

REFERENCE_POINTS = 1000
"""Number of clips in the reference sweep."""
PAPER_UPDATES = 10
"""Number of updates of Eq. 6 in the paper."""
STARTS = ("0", "max", "3σ", "4σ", "5σ")
"""The paper's starting points of the recursion (σ: standard deviation of the tensor, or of the row)."""
SEQUENCE = 20
"""Length of the sequences s_1, s_2, … that are stored."""
NEAR = 1e-4
"""Relative distance from the fixed point that counts as converged."""
DEPTH = 0.01
"""Minimum height of the ridge next to a second minimum, relative to the value of the minimum."""
FAR = 1.5
"""The sweep's clip is far from OCTAV's if one is more than this many times the other."""

_UPDATES = 100
_SETTLED = 1e-9
_OCTAV_CALLS = 5  # per round; the sweep takes hundreds of times as long
# Maximum of elements that are processed at a time, so that intermediate results stay in cache.
_PIECE = 1 << 16


class ErrorsOfClips:
    """The exact mean squared error of quantizing a tensor, for many clips without reading the tensor for each of them.

    In sorted order, values that are rounded to the same level are contiguous. Their sum, their sum of squares and their
    count are differences of prefix sums, from which the sum of their squared errors follows. All in float64.

    Args:
        x: floating point, any shape, finite, not empty.
        num_bits: 2 to 8.
        signed: whether the grid is two's-complement or unsigned.
    """

    def __init__(self, x: Tensor, num_bits: int, signed: bool):
        self._sorted = x.flatten().sort().values.double()
        zero = self._sorted.new_zeros(1)
        self._sums = torch.cat([zero, self._sorted.cumsum(0)])
        self._squares = torch.cat([zero, self._sorted.square().cumsum(0)])
        self._num_bits, self._signed = num_bits, signed

    def __call__(self, clips: Tensor) -> Tensor:
        """Errors in squared units of `x`, float64, of `clips`; both `[clips]`."""
        low, high = integer_range(self._num_bits, self._signed)
        levels = torch.arange(low, high + 1, dtype=torch.float64)
        steps = step_size(clips.double(), self._num_bits, self._signed)[:, None]
        ends = torch.searchsorted(self._sorted, steps * (levels[:-1] + 0.5))
        count = self._sorted.numel()
        ends = torch.cat([ends.new_zeros(len(clips), 1), ends, ends.new_full((len(clips), 1), count)], dim=1)
        counts, sums, squares = ends.diff(dim=1), self._sums[ends].diff(dim=1), self._squares[ends].diff(dim=1)
        values = steps * levels
        return (squares - 2 * values * sums + values.square() * counts).sum(dim=1).clamp(min=0) / count


class Eq6:
    """The recursion of Eq. 6 (unsigned: Appendix A) for each row, in float64.

    A clip above all magnitudes is followed by 0, and 0 by the mean of the nonzero magnitudes.

    Args:
        rows: `[rows, n]`, floating point, finite, n > 0.
        num_bits, signed: the grid. On an unsigned grid, negative values count as zeros.
    """

    def __init__(self, rows: Tensor, num_bits: int, signed: bool):
        self._sorted = magnitude(rows, signed).sort(dim=1).values.double()
        self._sums = torch.nn.functional.pad(self._sorted.cumsum(dim=1), (1, 0))
        self._zeros = (self._sorted == 0).sum(dim=1, keepdim=True)
        self._noise = noise_factor(num_bits, signed)

    def update(self, clips: Tensor) -> Tensor:
        """s_{n+1} for s_n; both `[rows]`, float64."""
        below = torch.searchsorted(self._sorted, clips[:, None], right=True)
        above = self._sorted.shape[1] - below
        total = self._sums[:, -1:] - self._sums.gather(1, below)
        denominator = self._noise * (below - self._zeros).clamp(min=0).double() + above
        return (total / denominator.clamp(min=self._noise))[:, 0]  # a row of zeros: 0 / 0

    def sequence(self, start: Tensor, updates: int) -> Tensor:
        """s_1 = `start`, s_2, …, `[updates + 1, rows]`."""
        clips = [start.double()]
        for _ in range(updates):
            clips.append(self.update(clips[-1]))
        return torch.stack(clips)


def starts(rows: Tensor, signed: bool) -> dict[str, Tensor]:
    """Name in `STARTS` -> starting points of the rows, `[rows]`, float64."""
    rows = rows.double()
    sigma = rows.std(dim=1, correction=0)
    peak = magnitude(rows, signed).amax(dim=1)
    return dict(zip(STARTS, (torch.zeros_like(peak), peak, 3 * sigma, 4 * sigma, 5 * sigma), strict=True))


def convergence(rows: Tensor, num_bits: int, signed: bool) -> tuple[dict[str, Any], Tensor]:
    """How fast the recursion of Eq. 6 converges.

    Returns:
        A dict for JSON, and the fixed points, float64 `[rows]`, NaN where there is none. The dict has `updates`
        (start -> number of updates until the clip stays within `NEAR` of the fixed point -> number of rows), `never`
        (start -> number of rows that are not that near after 100 updates), `disagree` (number of rows with a fixed
        point where the five starts do not end within `NEAR` of each other), `alternating` (number of rows without a
        fixed point, where the recursion from 0 alternates forever) and `alternation` (their largest relative jump).
    """
    recursion = Eq6(rows, num_bits, signed)
    sequences = {name: recursion.sequence(start, _UPDATES) for name, start in starts(rows, signed).items()}
    before, last = sequences["0"][-2:]
    jump = (last - before).abs()
    settled = jump <= _SETTLED * last
    ends = torch.stack([sequence[-1] for sequence in sequences.values()])
    disagree = settled & (ends.amax(dim=0) - ends.amin(dim=0) > NEAR * ends.amax(dim=0))
    record: dict[str, Any] = {
        "updates": {},
        "never": {},
        "disagree": int(disagree.sum()),
        "alternating": int((~settled).sum()),
        "alternation": float((jump / torch.maximum(before, last))[~settled].amax()) if not settled.all() else 0.0,
    }
    for name, sequence in sequences.items():
        far = (sequence - last).abs() > NEAR * last
        # index (from 1) of the last clip that is far away, which is the number of updates that is needed
        needed = (far * torch.arange(1, _UPDATES + 2)[:, None]).amax(dim=0)[settled]
        counts = Counter(needed.tolist())
        record["never"][name] = counts.pop(_UPDATES + 1, 0)
        record["updates"][name] = {str(count): rows for count, rows in sorted(counts.items())}
    return record, torch.where(settled, last, torch.nan)


def second_minima(errors: Tensor) -> Tensor:
    """For each row of `errors`, `[rows, points]`, the index of the second minimum of the curve, or -1.

    This is the lowest local minimum, other than the global one, that is separated from the global minimum by a ridge
    more than `DEPTH` (relative) above the local minimum. An end of the curve counts as a local minimum.
    """
    lowest = errors.argmin(dim=1, keepdim=True)
    index = torch.arange(errors.shape[1])
    right = errors.masked_fill(index < lowest, -torch.inf).cummax(dim=1).values
    left = errors.masked_fill(index > lowest, -torch.inf).flip(1).cummax(dim=1).values.flip(1)
    ridge = torch.where(index > lowest, right, left)
    # the lowest such point is a local minimum, because a lower neighbour would be behind the same ridge
    qualifies = ridge - errors > DEPTH * errors
    found = torch.where(qualifies, errors, torch.inf).argmin(dim=1)
    return torch.where(qualifies.any(dim=1), found, -1)


def measure(seen: SeenTensor, num_bits: int, repetitions: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """All measurements of a tensor's clips for one number of bits.

    Returns:
        Two dicts for JSON; clips are in the units of the tensor, errors in squared units. The first describes the
        tensor; with a clip per row, clips and errors are means over the rows. The second describes the tensor, or the
        row where the sweep's clip exceeds OCTAV's most, including `curve`: the errors of the clips
        `k / REFERENCE_POINTS * max|x|`.
    """
    x, signed = seen.values, seen.signed
    rows, _ = to_rows(x, seen.dim)
    clips, seconds = _timed(seen, num_bits, repetitions)
    clips["max"] = peak = max_clip(x, num_bits, signed=signed, dim=seen.dim).reshape(-1)
    fractions = torch.arange(1, REFERENCE_POINTS + 1, dtype=torch.float64) / REFERENCE_POINTS
    if seen.dim is None:
        errors_of = ErrorsOfClips(x, num_bits, signed)
        curves = errors_of(fractions * peak)[None]
        errors = {rule: errors_of(clip) for rule, clip in clips.items()}
    else:
        curves = _row_curves(rows, fractions.tolist(), num_bits, signed)
        errors = {rule: row_errors(rows, clip, num_bits, signed) for rule, clip in clips.items()}
    errors["best"], best = curves.min(dim=1)
    clips["best"] = fractions[best] * peak
    converged, fixed = convergence(rows, num_bits, signed)
    difference = ((clips["octav"] - fixed).abs() / fixed)[fixed > 0]  # leaves out NaN (no fixed point)
    second = second_minima(curves)
    apart = torch.maximum(second, best) + 1 > FAR * (torch.minimum(second, best) + 1)
    farthest = int((clips["sweep"] / clips["octav"]).nan_to_num(0).argmax())  # NaN: a row of zeros
    record = {
        "name": seen.name,
        "kind": seen.kind,
        "shape": list(x.shape),
        "signed": signed,
        "rows": None if seen.dim is None else len(rows),
        "clips": {rule: float(clip.double().mean()) for rule, clip in clips.items()},
        "mse": {rule: float(error.double().mean()) for rule, error in errors.items()},
        "octav_rows": None if seen.dim is None else _spread(clips["octav"]),
        "seconds": seconds,
        "convergence": converged,
        "octav_to_fixed_point": float(difference.max()) if difference.numel() else 0.0,
        "outlier": float(_outliers(rows).max()),
        "second_minima": int((second >= 0).sum()),
        "second_minima_far": int((apart & (second >= 0)).sum()),
        "second_minimum": _second_minimum(curves, second, peak, 0) if seen.dim is None else None,
        "sweep_far_above": int((clips["sweep"] > FAR * clips["octav"]).sum()),
        "sweep_far_below": int((clips["sweep"] * FAR < clips["octav"]).sum()),
    }
    curve = {
        "name": seen.name,
        "kind": seen.kind,
        "row": None if seen.dim is None else farthest,
        "clips": {rule: float(clip[farthest]) for rule, clip in clips.items()},
        "mse": {rule: float(error[farthest]) for rule, error in errors.items()},
        "second_minimum": _second_minimum(curves, second, peak, farthest),
        "curve": curves[farthest].tolist(),
    }
    return record, curve


def sequences(seen: SeenTensor, num_bits: int) -> dict[str, Any]:
    """For JSON: s_1, … from each of `STARTS`, for the tensor, or its row with the largest outlier."""
    rows, _ = to_rows(seen.values, seen.dim)
    row = int(_outliers(rows).argmax())
    chosen = rows[row : row + 1]
    recursion = Eq6(chosen, num_bits, seen.signed)
    return {
        "name": seen.name,
        "kind": seen.kind,
        "row": None if seen.dim is None else row,
        "sequences": {
            name: recursion.sequence(start, SEQUENCE - 1)[:, 0].tolist()
            for name, start in starts(chosen, seen.signed).items()
        },
    }


def _timed(seen: SeenTensor, num_bits: int, repetitions: int) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Clips `[rows]` by rule, and median seconds by function over interleaved calls.

    The seconds are processor time of all threads. Wall-clock time would be unfair to the sweep, which the system
    interrupts for other programs, while OCTAV finishes before.
    """
    x, options = seen.values, {"signed": seen.signed, "dim": seen.dim}
    functions: dict[str, tuple[int, Callable[[], Tensor]]] = {
        "octav": (_OCTAV_CALLS, lambda: octav_clip(x, num_bits, **options)),
        "eq6": (1, lambda: octav_clip(x, num_bits, max_iterations=PAPER_UPDATES, **options)),
        "sweep": (1, lambda: mse_sweep_clip(x, num_bits, **options)),
    }
    octav_clip(x, num_bits, **options)  # the first call may compile
    times: dict[str, list[float]] = {name: [] for name in functions}
    clips: dict[str, Tensor] = {}
    for _ in range(repetitions):
        for name, (calls, function) in functions.items():
            for _ in range(calls):
                begin = time.process_time()
                clips[name] = function()
                times[name].append(time.process_time() - begin)
    del clips["eq6"]
    return (
        {name: clip.reshape(-1) for name, clip in clips.items()},
        {name: statistics.median(values) for name, values in times.items()},
    )


def _row_curves(rows: Tensor, fractions: list[float], num_bits: int, signed: bool) -> Tensor:
    """Errors of the clips `fractions` times the row's largest magnitude, `[rows, fractions]`."""
    curves = []
    for piece in rows.split(max(1, _PIECE // rows.shape[1])):
        peak = magnitude(piece, signed).amax(dim=1)
        curves.append(torch.stack([row_errors(piece, peak * f, num_bits, signed) for f in fractions], dim=1))
    return torch.cat(curves)


def row_errors(rows: Tensor, clips: Tensor, num_bits: int, signed: bool) -> Tensor:
    """Mean squared errors, `[rows]`, in squared units of the tensor."""
    relative = quantization_error(rows, clips[:, None], num_bits, signed=signed, dim=1)[:, 0]
    return relative * rows.abs().amax(dim=1).square()


def _outliers(rows: Tensor) -> Tensor:
    """max|x| divided by the standard deviation, `[rows]`; 0 for a row of equal values."""
    sigma = rows.std(dim=1, correction=0)
    return torch.where(sigma > 0, rows.abs().amax(dim=1) / sigma, 0)


def _spread(values: Tensor) -> dict[str, float]:
    return {"min": float(values.min()), "median": float(values.median()), "max": float(values.max())}


def _second_minimum(curves: Tensor, second: Tensor, peak: Tensor, row: int) -> dict[str, float] | None:
    index = int(second[row])
    if index < 0:
        return None
    return {"clip": float(peak[row]) * (index + 1) / REFERENCE_POINTS, "mse": float(curves[row, index])}
