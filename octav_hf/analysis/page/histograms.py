"""The histograms of operands, as the page's script draws them."""

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from statistics import median
from typing import Any

from ..operand_statistics import OperandStatistics
from ..value_histogram import Histogram
from .numbers import decibels, percent, significant


def histograms(statistics: Iterable[OperandStatistics]) -> list[dict[str, Any]]:
    """What the script needs of each operand that has a histogram, worst first, with four significant digits.

    ``counts`` are of even bins from ``ends[0]`` to ``ends[1]``, ``tails`` of the values below and above.
    """
    rows = sorted(statistics, key=lambda row: math.inf if row.sqnr_db is None else row.sqnr_db)
    return [
        _drawn(row, row.histogram, row.levels) for row in rows if row.histogram is not None and row.levels is not None
    ]


def _drawn(row: OperandStatistics, histogram: Histogram, levels: Sequence[float]) -> dict[str, Any]:
    edges, counts = list(histogram.edges), list(histogram.counts)
    widths = [right - left for left, right in pairwise(edges)]
    width, tails = median(widths), [0, 0]
    if not math.isclose(widths[0], width, rel_tol=1e-6):
        tails[0], counts, edges = counts[0], counts[1:], edges[1:]
    if counts and not math.isclose(widths[-1], width, rel_tol=1e-6):
        tails[1], counts, edges = counts[-1], counts[:-1], edges[:-1]
    return {
        "module": row.module,
        "operand": row.operand,
        "ends": _rounded([edges[0], edges[-1]]),
        "counts": counts,
        "tails": tails,
        "levels": _rounded(levels),
        "clip": _rounded([levels[0], levels[-1] + levels[1] - levels[0]]),
        "caption": _caption(row),
    }


def _caption(row: OperandStatistics) -> str:
    clips = significant(row.clip)
    if row.lowest_clip != row.highest_clip:
        clips += f" on average (from {significant(row.lowest_clip)} to {significant(row.highest_clip)})"
    return (
        f"{row.elements:,} values from {significant(row.lowest)} to {significant(row.highest)}; {row.bits} bits, clip "
        f"{clips}. SQNR {decibels(row.sqnr_db)}; {percent(row.clipped_share)} of the values are outside the clip, "
        f"{percent(row.zero_share)} of those that are not 0 become 0."
    )


def _rounded(values: Iterable[float]) -> list[float]:
    return [float(f"{value:.4g}") for value in values]
