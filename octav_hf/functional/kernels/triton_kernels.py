"""Triton kernels for the magnitude table, the clips that are functions of it, and the clips of short rows.

``cuda.py`` calls them. ``table.py``, ``octav.py`` and ``mse.py`` say what they compute, and why.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from .. import mse

BINS = tl.constexpr(1 << 16)  # of a table, positive values' before the negative ones'
SET = tl.constexpr(4 * 32 * 128 + 4)  # numbers in a set of tails
_NEGATIVE = tl.constexpr(1 << 15)  # the first bin of negative values
_NOT_FINITE = tl.constexpr(255 << 7)  # the first bin of Inf and NaN
_COUNTED = tl.constexpr(1 << 40)  # what a value adds to its packed bin, besides its rest
_WINDOW = tl.constexpr(32 * 128)  # bins that matter, the highest of which is empty
_CHUNK = tl.constexpr(1024)  # bins that are summed at once
_PARTS, _ROUNDS = tl.constexpr(64), tl.constexpr(3)  # a clip is found to 64^-3 of its bin
_MAX_UPDATES, _TOLERANCE = tl.constexpr(64), tl.constexpr(2.0**-23)  # of Eq. 6
_LARGEST = tl.constexpr(2.0**128 - 2.0**104)  # float32
_NEAR, _FAR, _FINE = tl.constexpr(mse.NEAR), tl.constexpr(mse.FAR), tl.constexpr(mse.FINE)
_FAR_OF_ROW, _FINE_OF_ROW, _LOWEST = (
    tl.constexpr(mse.FAR_OF_ROW),
    tl.constexpr(mse.FINE_OF_ROW),
    tl.constexpr(mse.LOWEST),
)


@triton.jit(do_not_specialize=["numel", "tables"])
def count(x, skip, packed, numel, tables, block: tl.constexpr):
    """Add each value to its bin of a packed table: 2^40 for its count, and its rest. A program counts one block.

    Additions to one address wait for each other. So values in a block's first and last bin, such as the zeros of a
    ReLU or of a mask and the sixes of a ReLU6, are summed before.
    """
    program, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    offsets = program.to(tl.int64) * block + tl.arange(0, block)
    inside = offsets < numel
    if skip is not None:
        inside = inside & (tl.load(skip) == 0)
    values = tl.load(x + row * numel + offsets, mask=inside, other=0.0).to(tl.float32)
    bits = values.to(tl.int32, bitcast=True)
    bins = (bits >> 16) & 0xFFFF
    added = tl.where(inside, (bits & 0xFFFF).to(tl.int64) + _COUNTED, 0)
    table = packed + (row * tables + program % tables) * BINS
    first, last = tl.min(bins), tl.max(bins)
    tl.atomic_add(table + bins, added, mask=inside & (bins != first) & (bins != last), sem="relaxed")
    tl.atomic_add(table + first, tl.sum(tl.where(bins == first, added, 0)), sem="relaxed")
    tl.atomic_add(table + last, tl.sum(tl.where((bins == last) & (bins != first), added, 0)), sem="relaxed")


@triton.jit(do_not_specialize=["tables"])
def unpack(packed, table, tables, block: tl.constexpr):
    """Sum of a row's packed tables, as counts and sums of rests, int64 ``[2, 2, 32768]``."""
    row = tl.program_id(1).to(tl.int64)
    bins = tl.program_id(0) * block + tl.arange(0, block)
    counts, rests = tl.zeros([block], tl.int64), tl.zeros([block], tl.int64)
    for index in range(tables):
        values = tl.load(packed + (row * tables + index) * BINS + bins)
        counts, rests = counts + values // _COUNTED, rests + values % _COUNTED
    tl.store(table + row * 2 * BINS + bins, counts)
    tl.store(table + row * 2 * BINS + BINS + bins, rests)


@triton.jit
def _edges(bins):
    """Lower edges and widths of bins, float64."""
    exponent = bins >> 7
    width = ((tl.maximum(exponent, 1) + (1023 - 134)).to(tl.int64) << 52).to(tl.float64, bitcast=True)
    return ((bins & 127) + tl.where(exponent > 0, 128, 0)).to(tl.float64) * width, width


@triton.jit
def _clamp(x, low, high):
    return tl.minimum(tl.maximum(x, low), high)


@triton.jit
def _both_signs(table, bins, positive, negative):
    """Sum over the signs that count; 0 for bins of zeros and of what is not finite."""
    usable = (bins > 0) & (bins < _NOT_FINITE)
    values = tl.load(table + bins, mask=usable & positive, other=0)
    return values + tl.load(table + _NEGATIVE + bins, mask=usable & negative, other=0)


@triton.jit
def _above(tails, thresholds):
    """Count of the magnitudes above thresholds, and the sum of what they exceed them by."""
    first = tl.load(tails + 4 * _WINDOW).to(tl.int32)
    index = _clamp((thresholds.to(tl.float32).to(tl.int32, bitcast=True) >> 16) - first, 0, _WINDOW - 1)
    edge, width = _edges(first + index)
    number, mean = tl.load(tails + index), tl.load(tails + _WINDOW + index)
    below, above = tl.load(tails + tl.maximum(index - 1, 0)), tl.load(tails + tl.minimum(index + 1, _WINDOW - 1))
    alone = (number == 1) | (mean == 0)
    smooth = tl.where(alone, 0.0, tl.minimum(below, above))
    crowded = tl.where(alone | (number > 2 * (below + above)), number - smooth, 0.0)
    place = _clamp((number * mean - smooth / 2) / tl.maximum(crowded, 1.0), 0.0, 1.0)
    u = _clamp((thresholds - edge) / width, 0.0, 1.0)
    spread = number * _clamp((1 - u) * (1 + 6 * u * (mean - 0.5)), 0.0, 1.0)
    point = smooth * (1 - u) + tl.where(u < place, crowded, 0.0)
    higher = tl.load(tails + 2 * _WINDOW + index)
    count = higher + tl.where(crowded > 0, point, spread)
    line = (1 - u) * (1 - u) * (0.5 + (mean - 0.5) * (1 + 2 * u))
    spread = number * tl.maximum(tl.maximum(line, mean - u), 0.0)
    point = smooth * (1 - u) * (1 - u) / 2 + crowded * tl.maximum(place - u, 0.0)
    excess = width * tl.where(crowded > 0, point, spread)
    return count, excess + tl.load(tails + 3 * _WINDOW + index) + higher * (edge + width - thresholds)


@triton.jit(do_not_specialize=["num_bits"])
def fixed_point_of_table(tables, tails, result, num_bits, signed):
    """Fill a set of tails, and find OCTAV's clip from it. One program for each table and set.

    The sets are of all magnitudes, of positive and of negative ones. A set is float64: counts of bins, their mean
    places, counts and excesses above them, each ``[_WINDOW]``; then the first bin, the largest magnitude and the clip.
    """
    part, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    table = tables + row * 2 * BINS
    tails += (row * tl.num_programs(0) + part) * SET
    signed = tl.load(signed) != 0
    positive, negative = part < 2, signed & (part != 1)
    window = tl.arange(0, _WINDOW)
    counts, filled = tl.zeros([_WINDOW], tl.int64), tl.zeros([_WINDOW], tl.int32)
    for begin in range(0, _NEGATIVE, _WINDOW):
        new = _both_signs(table, begin + window, positive, negative)
        counts, filled = counts + new, tl.where(new > 0, begin + window, filled)
    nonzero, highest = tl.sum(counts).to(tl.float64), tl.max(filled)
    first = tl.maximum(highest - (_WINDOW - 2), 1)
    tl.store(tails + 4 * _WINDOW, first.to(tl.float64))
    noise = 1.0 / (tl.where(signed, 3, 12) << (2 * num_bits)).to(tl.float64)
    last, count_above, sum_above = first, nonzero * 0, nonzero * 0
    for chunk in range(1, _WINDOW // _CHUNK + 1):  # from the highest bins down
        index = _WINDOW - chunk * _CHUNK + tl.arange(0, _CHUNK)
        bins = first + index
        edge, width = _edges(bins)
        number = _both_signs(table, bins, positive, negative).to(tl.float64)
        mean = _both_signs(table + BINS, bins, positive, negative).to(tl.float64) / tl.maximum(number * 65536, 1.0)
        sums = number * edge + number * mean * width
        higher = count_above + tl.cumsum(number, 0, reverse=True) - number
        excess = sum_above + tl.cumsum(sums, 0, reverse=True) - sums - higher * (edge + width)
        tl.store(tails + index, number)
        tl.store(tails + _WINDOW + index, mean)
        tl.store(tails + 2 * _WINDOW + index, higher)
        tl.store(tails + 3 * _WINDOW + index, excess)
        # The highest bin whose lower edge is below the clip, which the last bin holds.
        below = noise * edge * (nonzero - higher - number) < excess + width * (number * mean + higher)
        last = tl.maximum(last, tl.max(tl.where(below, bins, 0)))
        count_above, sum_above = count_above + tl.sum(number), sum_above + tl.sum(sums)
    tl.debug_barrier()
    low, step = _edges(last)
    for _ in range(_ROUNDS):
        step /= _PARTS
        points = low + step * tl.arange(0, _PARTS)
        count, excess = _above(tails, points)
        below = noise * points * (nonzero - count) < excess
        low += step * (tl.maximum(tl.sum(below.to(tl.int32)), 1) - 1)
    clip = tl.where(nonzero > 0, low + step / 2, 0.0)
    edge, width = _edges(highest)
    place = tl.where(tl.load(tails + highest - first) > 1, 1.0, tl.load(tails + _WINDOW + highest - first))
    tl.store(tails + 4 * _WINDOW + 1, tl.where(nonzero > 0, edge + width * place, 0.0))
    tl.store(tails + 4 * _WINDOW + 2, clip)
    if part == 0:
        bins = _NOT_FINITE + tl.arange(0, 128)
        broken = tl.sum(tl.load(table + bins) + tl.load(table + _NEGATIVE + bins))
        tl.store(result + row, tl.where(broken == 0, clip, float("nan")).to(tl.float32))


@triton.jit
def _gains(tails, clips, levels, signed, shape: tl.constexpr):
    """What the error of each clip is less than the sum of squares."""
    steps = clips / levels
    total = tl.zeros(shape, tl.float64)
    for begin in range(1, levels + 1, shape[1]):
        number = (begin + tl.arange(0, shape[1]))[None, :]
        thresholds = (number - 0.5) * steps[:, None]
        total += tl.where(number < levels, _above(tails + SET, thresholds)[1], 0.0)
        if signed:
            total += tl.where(number <= levels, _above(tails + 2 * SET, thresholds)[1], 0.0)
    return 2 * steps * tl.sum(total, 1)


@triton.jit
def _candidate(index, lowest, last, top, near: tl.constexpr, far: tl.constexpr):
    """A clip to try, and log2 of its ratio to the next: ``near`` to ``last``, ``far`` from there to ``top``."""
    near_step = tl.log2(last / lowest) / (near - 1)
    far_step = tl.log2(tl.maximum(top / last, 1.0)) / far
    is_far = index >= near
    step = tl.where(is_far, far_step, near_step)
    clip = tl.where(is_far, last, lowest) * tl.exp2(step * tl.where(is_far, index - (near - 1), index))
    return clip, tl.maximum(step, near_step)


@triton.jit
def _between(index, clip, step, fine: tl.constexpr):
    """The clip, and ``fine`` clips around it."""
    return tl.where(index == 0, clip, clip * tl.exp2(step * (index * (2.0 / (fine + 1)) - 1)))


@triton.jit(do_not_specialize=["num_bits"])
def lowest_error_of_tails(tails, result, num_bits, highest, signed):
    """The clip with the lowest error, from the three sets of tails of a table. One program a table."""
    row = tl.program_id(0).to(tl.int64)
    tails += row * 3 * SET
    signed = tl.load(signed) != 0
    levels = tl.where(signed, 1, 2) << (num_bits - 1)
    top = tl.maximum(tl.load(tails + SET + 4 * _WINDOW + 1), tl.load(tails + 2 * SET + 4 * _WINDOW + 1))
    index = tl.arange(0, 64)
    octav = tl.load(tails + 4 * _WINDOW + 2)
    top = top * levels / (levels - 1)
    clips, steps = _candidate(index, octav * _LOWEST, octav * highest, top, _NEAR, _FAR)
    gains = tl.where(index < _NEAR + _FAR, _gains(tails, clips, levels, signed, [64, 8]), -1.0)
    best = index == tl.argmax(gains, 0)
    clip, step = tl.sum(tl.where(best, clips, 0.0)), tl.sum(tl.where(best, steps, 0.0))
    index = tl.arange(0, 16)
    clips = _between(index, clip, step, _FINE)
    gains = tl.where(index <= _FINE, _gains(tails, clips, levels, signed, [16, 32]), -1.0)
    clip = tl.sum(tl.where(index == tl.argmax(gains, 0), clips, 0.0))
    before = tl.load(result + row)
    tl.store(result + row, tl.where(before > 0, tl.minimum(clip, _LARGEST).to(tl.float32), before))


@triton.jit(do_not_specialize=["num_bits"])
def clips_of_rows(
    rows, skip, result, length, num_bits, signed, lowest, highest, beyond, near: tl.constexpr, block: tl.constexpr
):
    """Clips of short rows, one program each: OCTAV's, or those with the lowest error if ``lowest`` ... are given."""
    row = tl.program_id(0)
    offsets = tl.arange(0, block)
    inside = offsets < length
    if skip is not None:
        inside = inside & (tl.load(skip) == 0)
    values = tl.load(rows + row.to(tl.int64) * length + offsets, mask=inside, other=0.0).to(tl.float32)
    finite = tl.max(values.to(tl.int32, bitcast=True) & 0x7FFFFFFF) < (_NOT_FINITE << 16)
    signed = tl.load(signed) != 0
    values = tl.where(signed, values, tl.maximum(values, 0.0))
    nonzero = tl.sum((values != 0).to(tl.float32))
    # In units of a power of two near the largest magnitude, so that sums do not overflow and it is not subnormal.
    exponent = _clamp(tl.max(values.to(tl.int32, bitcast=True) & 0x7FFFFFFF) >> 23, 1, 253)
    values *= ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    noise = 1.0 / (tl.where(signed, 3, 12) << (2 * num_bits)).to(tl.float32)
    clip = _fixed_point(tl.abs(values), nonzero, noise)
    if lowest is not None:
        levels = (tl.where(signed, 1, 2) << (num_bits - 1)).to(tl.float32)
        clip = _lowest_error(values, clip, levels, lowest, highest, beyond, near)
    clip = tl.minimum(clip * (exponent << 23).to(tl.float32, bitcast=True), _LARGEST)
    tl.store(result + row, tl.where(finite, clip, float("nan")))


@triton.jit
def _fixed_point(magnitudes, nonzero, noise):
    """Eq. 6, from the clip of Gaussian values on, in a bracket that is halved when an update leaves it."""
    high = tl.max(magnitudes)
    clip = (tl.sqrt(-2 * tl.log(noise)) - 1.05) * 1.2533141 * tl.sum(magnitudes) / tl.maximum(nonzero, 1.0)
    clip = tl.minimum(clip, high)
    low, change, updates = high * 0, high, 0
    while (change > clip * _TOLERANCE) & (updates < _MAX_UPDATES):
        count = tl.sum((magnitudes > clip).to(tl.float32))
        after = tl.sum(tl.where(magnitudes > clip, magnitudes, 0.0)) / (noise * (nonzero - count) + count)
        low, high = tl.where(after > clip, clip, low), tl.where(after > clip, high, clip)
        after = tl.where((after > low) & (after < high), after, (low + high) / 2)
        change, clip, updates = tl.abs(after - clip), after, updates + 1
    return clip


@triton.jit
def _lowest_error(values, octav, levels, lowest, highest, beyond, near: tl.constexpr):
    """The clip with the lowest error among the candidates, measured on the whole row."""
    top = tl.max(tl.abs(values)) * (levels / (levels - 1))
    last = tl.maximum(tl.minimum(octav * highest, top * beyond), octav * 1.02)
    middle, middle_step, least = octav, octav, float("inf")
    for index in range(near + _FAR_OF_ROW):
        clip, step = _candidate(index, octav * lowest, last, top, near, _FAR_OF_ROW)
        error = _error(values, clip / levels, levels)
        middle, middle_step = tl.where(error < least, clip, middle), tl.where(error < least, step, middle_step)
        least = tl.minimum(error, least)
    best = middle
    for index in range(1, _FINE_OF_ROW + 1):
        clip = _between(index, middle, middle_step, _FINE_OF_ROW)
        error = _error(values, clip / levels, levels)
        best, least = tl.where(error < least, clip, best), tl.minimum(error, least)
    return tl.where(octav > 0, best, octav)


@triton.jit
def _error(values, step, levels):
    number = _clamp(tl.floor(values * (1 / step) + 0.5), -levels, levels - 1)
    return tl.sum((values - step * number) * (values - step * number))
