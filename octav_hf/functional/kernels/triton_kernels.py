"""Triton kernels for magnitude tables, clips computed from tables, and clips of short rows.

``cuda.py`` calls them; ``table.py``, ``octav.py`` and ``mse.py`` explain the formulas.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

BINS = tl.constexpr(1 << 16)  # of a table: positive values, then negative ones
TAILS = tl.constexpr(6 * 2 * 32 * 128)  # numbers that _fill stores for a table
_NEGATIVE = tl.constexpr(1 << 15)  # the first bin of negative values
_NOT_FINITE = tl.constexpr(255 << 7)  # the first bin of Inf and NaN
_COUNTED = tl.constexpr(1 << 40)  # adds 1 to the count in a packed bin; the rest is added to the lower bits
_WINDOW = tl.constexpr(32 * 128)  # bins that are used; the highest is empty
_CHUNK = tl.constexpr(512)  # bins that are summed at once
_PLACES = tl.constexpr(1 << 18)  # possible clips per bin
_MAX_UPDATES, _TOLERANCE = tl.constexpr(64), tl.constexpr(2.0**-23)  # of Eq. 6
_LARGEST = tl.constexpr(2.0**128 - 2.0**104)  # float32


@triton.jit
def _noise(num_bits, signed):
    """Noise factor c of Eq. 4, float64."""
    return 1.0 / (tl.where(signed, 3, 12) << (2 * num_bits)).to(tl.float64)


@triton.jit
def _magnitudes(values, signed):
    return tl.where(signed, tl.abs(values), tl.maximum(values, 0.0))


@triton.jit(do_not_specialize=["numel", "num_bits", "stride"])
def guess(x, skip, signed, sums, numel, num_bits, stride, block: tl.constexpr):
    """Start a row's sums, float64 ``[5]``, with a threshold close to OCTAV's clip: slightly below that of a sample."""
    row, index = tl.program_id(0).to(tl.int64), tl.arange(0, block)
    offsets = index.to(tl.int64) * stride + (index * 40503) % stride  # irregular, because strides meet patterns
    inside = offsets < numel
    if skip is not None:
        inside = inside & (tl.load(skip) == 0)
    signed = tl.load(signed) != 0
    values = _magnitudes(tl.load(x + row * numel + offsets, mask=inside, other=0.0).to(tl.float32), signed)
    values, unit = _scaled(values)
    clip = _fixed_point(values, tl.sum((values != 0).to(tl.float32)), _noise(num_bits, signed).to(tl.float32), 2.0**-6)
    tl.store(sums + row * 5, (0.98 * clip * unit).to(tl.float64))
    for index in range(1, 5):
        tl.store(sums + row * 5 + index, 0.0)


@triton.jit(do_not_specialize=["numel"])
def add_sums(x, skip, signed, sums, numel, blocks: tl.constexpr, block: tl.constexpr):
    """Add to a row's sums: number of nonzero magnitudes, number and sum of those above the threshold, and maximum."""
    row = tl.program_id(1).to(tl.int64)
    sums += row * 5
    threshold = tl.load(sums).to(tl.float32)
    signed = tl.load(signed) != 0
    count, above, total = tl.zeros([block], tl.float32), tl.zeros([block], tl.float32), tl.zeros([block], tl.float32)
    top = tl.zeros([block], tl.float32)
    for index in range(blocks):
        offsets = (tl.program_id(0).to(tl.int64) * blocks + index) * block + tl.arange(0, block)
        inside = offsets < numel
        if skip is not None:
            inside = inside & (tl.load(skip) == 0)
        values = _magnitudes(tl.load(x + row * numel + offsets, mask=inside, other=0.0).to(tl.float32), signed)
        count += (values.to(tl.int32, bitcast=True) > 0xFFFF).to(tl.float32)  # as a table, which counts bin 0 as zeros
        is_above = values > threshold
        above, total = above + is_above.to(tl.float32), total + tl.where(is_above, values, 0.0)
        top = tl.maximum(top, values)
    tl.atomic_add(sums + 1, tl.sum(count).to(tl.float64), sem="relaxed")
    tl.atomic_add(sums + 2, tl.sum(above).to(tl.float64), sem="relaxed")
    tl.atomic_add(sums + 3, tl.sum(total.to(tl.float64)), sem="relaxed")
    tl.atomic_max(sums + 4, tl.max(top).to(tl.float64), sem="relaxed")


@triton.jit
def _floor(sums, noise):
    """A lower bound of OCTAV's clip; 0 if the threshold of the sums is out of range.

    It is the threshold t if h(t) < 0. Otherwise it is the update s of Eq. 6 from t: then s <= t, so the magnitudes
    above t have the excess S - n s = c s N over s, for n magnitudes above t with the sum S, and N others; and at most N
    magnitudes are inside s. Hence h(s) <= 0.
    """
    threshold, count, above, total = tl.load(sums), tl.load(sums + 1), tl.load(sums + 2), tl.load(sums + 3)
    update = total / tl.maximum(noise * (count - above) + above, 1e-300)
    floor = 0.999 * tl.minimum(threshold, update)  # a margin for the rounding of float32 sums
    return tl.where((threshold > 1e-30) & (threshold < 1e30), floor, 0.0)


@triton.jit
def _counted_bins(sums, noise, reach):
    """The lowest bin that is counted, two below ``reach`` times ``_floor``, and the highest."""
    lowest = (_floor(sums, noise) * reach).to(tl.float32).to(tl.int32, bitcast=True) >> 16
    highest = tl.load(sums + 4).to(tl.float32).to(tl.int32, bitcast=True) >> 16
    return tl.maximum(lowest - 2, 1), highest


@triton.jit(do_not_specialize=["numel", "tables", "num_bits"])
def count(x, skip, packed, numel, tables, sums, signed, num_bits, reach, block: tl.constexpr):
    """Count each value in its bin of a packed table by adding 2^40 plus its rest. A program counts one block.

    Atomic additions to one address are serialized, so values in a block's first and last bin, such as the zeros of a
    ReLU or a mask and the sixes of a ReLU6, are summed first. With ``sums``, only magnitudes of ``_counted_bins`` are
    counted, because the others cannot change the clip; and what is not finite.
    """
    program, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    offsets = program.to(tl.int64) * block + tl.arange(0, block)
    inside = offsets < numel
    if skip is not None:
        inside = inside & (tl.load(skip) == 0)
    values = tl.load(x + row * numel + offsets, mask=inside, other=0.0).to(tl.float32)
    bits = values.to(tl.int32, bitcast=True)
    bins = (bits >> 16) & 0xFFFF
    if sums is not None:
        is_signed = tl.load(signed) != 0
        lowest, _ = _counted_bins(sums + row * 5, _noise(num_bits, is_signed), reach)
        magnitude_bins = bins & 0x7FFF
        counts = (bins < _NEGATIVE) | is_signed | (magnitude_bins >= _NOT_FINITE)
        inside = inside & (magnitude_bins >= lowest) & counts
    added = tl.where(inside, (bits & 0xFFFF).to(tl.int64) + _COUNTED, 0)
    table = packed + (row * tables + program % tables) * BINS
    first, last = tl.min(bins), tl.max(bins)
    tl.atomic_add(table + bins, added, mask=inside & (bins != first) & (bins != last), sem="relaxed")
    at_first, at_last = tl.sum(tl.where(bins == first, added, 0)), tl.sum(tl.where(bins == last, added, 0))
    tl.atomic_add(table + first, at_first, mask=at_first != 0, sem="relaxed")
    tl.atomic_add(table + last, at_last, mask=(at_last != 0) & (last != first), sem="relaxed")


@triton.jit(do_not_specialize=["tables", "num_bits"])
def unpack(packed, table, tables, sums, signed, num_bits, reach, block: tl.constexpr):
    """Add up a row's packed tables and split them into counts and sums of rests, int64 ``[2, 2, 32768]``.

    With ``sums``, a program does nothing if its bins cannot be filled.
    """
    row = tl.program_id(1).to(tl.int64)
    begin = tl.program_id(0) * block
    bins = begin + tl.arange(0, block)
    if sums is not None:
        lowest, highest = _counted_bins(sums + row * 5, _noise(num_bits, tl.load(signed) != 0), reach)
        begin = begin % _NEGATIVE
        if ((begin + block <= lowest) | (begin > highest)) & (begin + block <= _NOT_FINITE):
            return
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
def _load(table, sign, bins, lowest, highest, signed):
    """Values of bins, float64; 0 outside ``lowest`` to ``highest``, and for negative values on an unsigned grid."""
    used = (bins >= lowest) & (bins <= highest) & ((sign == 0) | signed)
    return tl.load(table + sign * _NEGATIVE + bins, mask=used, other=0).to(tl.float64)


@triton.jit
def _fill(table, tails, first, chunks, lowest, highest, signed):
    """Store ``chunks`` of bins for ``_above``, float64 ``[6, 2, _WINDOW]``, and return the largest magnitude."""
    sign = tl.arange(0, 2)[:, None]
    count_above, sum_above = tl.zeros([2, 1], tl.float64), tl.zeros([2, 1], tl.float64)
    top = tl.sum(count_above)
    for chunk in range(chunks):  # from the highest bins down
        index = (chunks - 1 - chunk) * _CHUNK + tl.arange(0, _CHUNK)[None, :]
        bins = first + index
        edge, width = _edges(bins)
        number = _load(table, sign, bins, lowest, highest, signed)
        mean = _load(table + BINS, sign, bins, lowest, highest, signed) / tl.maximum(number * 65536, 1.0)
        below = _load(table, sign, tl.maximum(bins - 1, 1), lowest, highest, signed)
        above = _load(table, sign, bins + 1, lowest, highest, signed)
        at_one_place = (number == 1) | (mean == 0)
        is_crowded = at_one_place | (number > 2 * (below + above))
        others = tl.where(at_one_place, 0.0, tl.minimum(below, above))
        crowd = tl.where(is_crowded, number - others, 0.0)
        to = tails + sign * _WINDOW + index
        tl.store(to, number - crowd)
        tl.store(to + 2 * _WINDOW, tl.where(is_crowded, 0.5, mean))
        tl.store(to + 4 * _WINDOW, crowd)
        tl.store(to + 6 * _WINDOW, tl.clamp((number * mean - others / 2) / tl.maximum(crowd, 1.0), 0.0, 1.0))
        sums = number * (edge + mean * width)
        higher = count_above + tl.cumsum(number, 1, reverse=True) - number
        tl.store(to + 8 * _WINDOW, higher)
        excess = sum_above + tl.cumsum(sums, 1, reverse=True) - sums - higher * (edge + width)
        tl.store(to + 10 * _WINDOW, excess)
        top = tl.maximum(top, tl.max(tl.where(number > 0, edge + width * tl.where(number > 1, 1.0, mean), 0.0)))
        count_above += tl.sum(number, 1, keep_dims=True)
        sum_above += tl.sum(sums, 1, keep_dims=True)
    return top


@triton.jit
def _above(tails, first, chunks, sign, thresholds):
    """Count and excess of the magnitudes of one sign above thresholds; see ``Tails`` in ``table.py``."""
    index = (thresholds.to(tl.float32).to(tl.int32, bitcast=True) >> 16) - first
    index = tl.minimum(tl.maximum(index, 0), chunks * _CHUNK - 1)
    edge, width = _edges(first + index)
    at = tails + sign * _WINDOW + index
    spread, tilt = tl.load(at), tl.load(at + 2 * _WINDOW) - 0.5
    crowd, place = tl.load(at + 4 * _WINDOW), tl.load(at + 6 * _WINDOW)
    count, excess = tl.load(at + 8 * _WINDOW), tl.load(at + 10 * _WINDOW)
    u = tl.clamp((thresholds - edge) / width, 0.0, 1.0)
    line = tl.maximum(tl.maximum((1 - u) * (1 - u) * (0.5 + tilt * (1 + 2 * u)), tilt + 0.5 - u), 0.0)
    excess += count * (edge + width - thresholds) + width * (spread * line + crowd * tl.maximum(place - u, 0.0))
    return count + spread * tl.clamp((1 - u) * (1 + 6 * u * tilt), 0.0, 1.0) + tl.where(u < place, crowd, 0.0), excess


@triton.jit
def _sign_change(tails, first, chunks, nonzero, noise, floor):
    """OCTAV's clip, above ``floor``, by five rounds of 64 thresholds; places are counted from the lowest edge."""
    place, step = first * 0, first * 0 + _WINDOW * _PLACES
    for _ in range(5):
        step //= 64
        places = place + step * tl.arange(0, 64)
        edge, width = _edges(first + places // _PLACES)
        clips = edge + width * ((places % _PLACES).to(tl.float64) / _PLACES)
        positive, positive_excess = _above(tails, first, chunks, 0, clips)
        negative, negative_excess = _above(tails, first, chunks, 1, clips)
        below = noise * clips * (nonzero - positive - negative) < positive_excess + negative_excess
        below = below | (clips < floor)
        place += step * (tl.maximum(tl.sum(below.to(tl.int32)), 1) - 1)
    edge, width = _edges(first + place // _PLACES)
    return edge + width * (((place % _PLACES) + 1).to(tl.float64) / _PLACES)


@triton.jit
def _error_of_table(tails, first, chunks, clips, levels, signed, shape: tl.constexpr):
    """The squared error of each clip, minus the sum of squares."""
    steps = clips / levels
    total = tl.zeros(shape, tl.float64)
    for begin in range(1, levels + 1, shape[1]):
        number = (begin + tl.arange(0, shape[1]))[None, :]
        thresholds = (number - 0.5) * steps[:, None]
        total += tl.where(number < levels, _above(tails, first, chunks, 0, thresholds)[1], 0.0)
        if signed:
            total += tl.where(number <= levels, _above(tails, first, chunks, 1, thresholds)[1], 0.0)
    return -2 * steps * tl.sum(total, 1)


@triton.jit
def _candidate(index, first, last, top, near, far):
    """Candidate clip ``index``, and log2 of the ratio of neighbours: ``near`` up to ``last``, ``far`` up to ``top``."""
    near_step = tl.log2(last / first) / (near - 1)
    far_step = tl.log2(tl.maximum(top / last, 1.0)) / far
    is_far = index >= near
    step = tl.where(is_far, far_step, near_step)
    clip = tl.where(is_far, last, first) * tl.exp2(step * tl.where(is_far, index - (near - 1), index))
    return clip, tl.maximum(step, near_step)


@triton.jit
def _around(index, clip, step, fine):
    """Candidate ``index`` around ``clip``: 0 is the clip itself, followed by ``fine`` others."""
    return tl.where(index == 0, clip, clip * tl.exp2(step * (index * (2.0 / (fine + 1)) - 1)))


@triton.jit(do_not_specialize=["num_bits", "near", "far", "fine"])
def clip_of_table(tables, tails, sums, result, num_bits, signed, reach, lowest, highest, beyond, near, far, fine):
    """OCTAV's clip of a table, or with a search the clip with the lowest error. One program per table.

    ``sums`` and ``reach`` are those with which ``count`` left out values, if it did.
    """
    row = tl.program_id(0).to(tl.int64)
    table = tables + row * 2 * BINS
    tails += row * TAILS
    signed = tl.load(signed) != 0
    noise = _noise(num_bits, signed)
    if sums is None:
        window = tl.arange(0, _WINDOW)
        counts, filled = tl.zeros([_WINDOW], tl.float64), tl.zeros([_WINDOW], tl.int32)
        for begin in range(0, _NEGATIVE, _WINDOW):
            new = _load(table, 0, begin + window, 1, _NOT_FINITE - 1, signed)
            new += _load(table, 1, begin + window, 1, _NOT_FINITE - 1, signed)
            counts, filled = counts + new, tl.where(new > 0, begin + window, filled)
        nonzero, floor = tl.sum(counts), noise * 0
        low, high = tl.max(filled) * 0 + 1, tl.max(filled)
    else:
        nonzero, floor = tl.load(sums + row * 5 + 1), _floor(sums + row * 5, noise)
        low, high = _counted_bins(sums + row * 5, noise, reach)
    first = tl.maximum(high - (_WINDOW - 2), low)
    chunks = (high + 1 - first) // _CHUNK + 1  # the bin above the highest is empty
    top = _fill(table, tails, first, chunks, low, high, signed)
    tl.debug_barrier()
    clip = _sign_change(tails, first, chunks, nonzero, noise, floor)
    if lowest is not None:
        levels = tl.where(signed, 1, 2) << (num_bits - 1)
        top = top * levels / (levels - 1)
        last = tl.maximum(tl.minimum(clip * highest, top * beyond), clip * 1.02)
        index = tl.arange(0, 64)
        clips, steps = _candidate(index, clip * lowest, last, top, near, far)
        errors = _error_of_table(tails, first, chunks, clips, levels, signed, [64, 8])
        best = index == tl.argmin(tl.where(index < near + far, errors, float("inf")), 0)
        middle, step = tl.sum(tl.where(best, clips, 0.0)), tl.sum(tl.where(best, steps, 0.0))
        index = tl.arange(0, 16)
        clips = _around(index, middle, step, fine)
        errors = _error_of_table(tails, first, chunks, clips, levels, signed, [16, 32])
        best = index == tl.argmin(tl.where(index <= fine, errors, float("inf")), 0)
        clip = tl.minimum(tl.sum(tl.where(best, clips, 0.0)), _LARGEST)
    bins = _NOT_FINITE + tl.arange(0, 128)
    broken = tl.sum(tl.load(table + bins) + tl.load(table + _NEGATIVE + bins))
    clip = tl.where(nonzero > 0, clip, 0.0)
    tl.store(result + row, tl.where(broken == 0, clip, float("nan")).to(tl.float32))


@triton.jit
def _scaled(values):
    """Values divided by a power of two near the largest magnitude, and that power of two.

    Sums do not overflow, and no magnitude that matters is subnormal.
    """
    exponent = tl.minimum(tl.maximum(tl.max(values.to(tl.int32, bitcast=True) & 0x7FFFFFFF) >> 23, 1), 253)
    factor = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    return values * factor, (exponent << 23).to(tl.float32, bitcast=True)


@triton.jit
def _fixed_point(magnitudes, nonzero, noise, tolerance):
    """Fixed point of Eq. 6, starting from the clip of Gaussian values; bisection where an update leaves the bracket."""
    high = tl.max(magnitudes)
    clip = (tl.sqrt(-2 * tl.log(noise)) - 1.05) * 1.2533141 * tl.sum(magnitudes) / tl.maximum(nonzero, 1.0)
    clip = tl.minimum(clip, high)
    low, change, updates = high * 0, high, 0
    while (change > clip * tolerance) & (updates < _MAX_UPDATES):
        count = tl.sum((magnitudes > clip).to(tl.float32))
        after = tl.sum(tl.where(magnitudes > clip, magnitudes, 0.0)) / (noise * (nonzero - count) + count)
        low, high = tl.where(after > clip, clip, low), tl.where(after > clip, high, clip)
        after = tl.where((after > low) & (after < high), after, (low + high) / 2)
        change, clip, updates = tl.abs(after - clip), after, updates + 1
    return clip


@triton.jit
def _error_of_row(values, step, levels):
    number = tl.clamp(tl.floor(values * (1 / step) + 0.5), -levels, levels - 1)
    return tl.sum((values - step * number) * (values - step * number))


@triton.jit(do_not_specialize=["num_bits", "near", "far", "fine"])
def clip_of_row(
    rows, skip, result, length, num_bits, signed, lowest, highest, beyond, near, far, fine, block: tl.constexpr
):
    """OCTAV's clip of a short row, or with a search the clip with the lowest error. One program per row."""
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
    values, unit = _scaled(values)
    clip = _fixed_point(tl.abs(values), nonzero, _noise(num_bits, signed).to(tl.float32), _TOLERANCE)
    if lowest is not None:
        levels = (tl.where(signed, 1, 2) << (num_bits - 1)).to(tl.float32)
        top = tl.max(tl.abs(values)) * (levels / (levels - 1))
        last = tl.maximum(tl.minimum(clip * highest, top * beyond), clip * 1.02)
        middle, middle_step, least = clip, clip, float("inf")
        for index in range(near + far):
            tried, step = _candidate(index, clip * lowest, last, top, near, far)
            error = _error_of_row(values, tried / levels, levels)
            middle, middle_step = tl.where(error < least, tried, middle), tl.where(error < least, step, middle_step)
            least = tl.minimum(error, least)
        clip = middle
        for index in range(1, fine + 1):
            tried = _around(index, middle, middle_step, fine)
            error = _error_of_row(values, tried / levels, levels)
            clip, least = tl.where(error < least, tried, clip), tl.minimum(error, least)
    clip = tl.minimum(clip * unit, _LARGEST)
    clip = tl.where(nonzero > 0, clip, 0.0)
    tl.store(result + row, tl.where(finite, clip, float("nan")))
