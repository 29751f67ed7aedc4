"""Numbers as the page writes them, and the scales of its charts."""

import math

NOTHING = "–"
"""In the place of what was not measured."""


def decibels(sqnr: float | None) -> str:
    if sqnr is None:
        return NOTHING
    return "exact" if sqnr == math.inf else f"{sqnr:.1f} dB"


def percent(share: float | None) -> str:
    """A share of 1, with at least two digits below 10 %."""
    if share is None:
        return NOTHING
    if 0 < share < 0.0001:
        return "< 0.01 %"
    digits = 0 if share >= 0.1 or share == 0 else 1 if share >= 0.01 else 2
    return f"{100 * share:.{digits}f} %"


def size(count: int) -> str:
    """Bytes in the largest decimal unit that leaves at least 1."""
    for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return f"{count} bytes"


def significant(value: float | None) -> str:
    """Three significant digits."""
    return NOTHING if value is None else f"{value:.3g}"


def relative_error(sqnr: float | None) -> float:
    """Root mean square of the error over that of the values; 0 where there is no signal."""
    return 0.0 if sqnr is None else 10 ** (-sqnr / 20)


def scale(largest: float) -> tuple[float, list[float]]:
    """The end of an axis from 0 that holds ``largest``, and its ticks: multiples of 1, 2 or 5 times a power of ten."""
    if not 0 < largest < math.inf:
        return 1.0, [0.0, 1.0]
    power = 10.0 ** math.floor(math.log10(largest / 4))
    step = next(factor * power for factor in (1, 2, 5, 10) if largest <= 4 * factor * power)
    ticks = [number * step for number in range(math.ceil(largest / step - 1e-9) + 1)]
    return ticks[-1], ticks
