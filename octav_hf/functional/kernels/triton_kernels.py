"""Triton kernels; see ``cuda.py`` for their arguments."""

import triton
import triton.language as tl

_UPDATES: tl.constexpr = tl.constexpr(20)  # on chip they cost next to nothing


@triton.jit
def _magnitudes(x, signed: tl.constexpr):  # type: ignore[no-untyped-def]
    values = x.to(tl.float32)
    return tl.abs(values) if signed else tl.where(values < 0, 0.0, values)  # NaN stays NaN


@triton.jit
def sums(x, thresholds, result, numel, signed: tl.constexpr, two: tl.constexpr, block: tl.constexpr):  # type: ignore[no-untyped-def]
    """Each program reads every ``programs``-th block. Values that are not finite make the sums so."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    low = tl.load(thresholds)
    first_sum = tl.zeros([block], tl.float32)
    first_count = tl.zeros([block], tl.float32)
    second_sum = tl.zeros([block], tl.float32)
    second_count = tl.zeros([block], tl.float32)
    for begin in range(program.to(tl.int64) * block, numel, programs.to(tl.int64) * block):
        offsets = begin + tl.arange(0, block)
        values = tl.load(x + offsets, mask=offsets < numel, other=0.0)
        magnitudes = _magnitudes(values, signed)
        if two:
            high = tl.load(thresholds + 1)
            first_sum += tl.where(magnitudes > low, magnitudes, 0.0)
            first_count += tl.where(magnitudes > low, 1.0, 0.0)
            second_sum += tl.where(magnitudes > high, magnitudes, 0.0)
            second_count += tl.where(magnitudes > high, 1.0, 0.0)
        else:
            first_sum += tl.abs(values.to(tl.float32))
            first_count += tl.where(magnitudes > 0, 1.0, 0.0)
            second_sum += tl.where(magnitudes > low, magnitudes, 0.0)
            second_count += tl.where(magnitudes > low, 1.0, 0.0)
    tl.store(result + program, tl.sum(first_sum))
    tl.store(result + programs + program, tl.sum(first_count))
    tl.store(result + 2 * programs + program, tl.sum(second_sum))
    tl.store(result + 3 * programs + program, tl.sum(second_count))


@triton.jit
def row_updates(rows, result, count, length, noise, start, signed: tl.constexpr, block: tl.constexpr):  # type: ignore[no-untyped-def]
    """One program a row."""
    row = tl.program_id(0)
    offsets = tl.arange(0, block)
    values = tl.load(rows + row.to(tl.int64) * length + offsets, mask=offsets < length, other=0.0)
    magnitudes = _magnitudes(values, signed)
    nonzero = tl.sum(tl.where(magnitudes > 0, 1.0, 0.0))
    # NaN, which every update keeps, for a row that is not finite or all zero.
    missing = tl.sum(tl.abs(values.to(tl.float32))) * 0.0 / nonzero
    highest = tl.max(magnitudes) * (1 - 2.0**-20)  # above every magnitude Eq. 6 would start over from 0
    clip = tl.minimum(start * tl.sum(magnitudes) / nonzero, highest) + missing
    before = clip
    last = clip
    for _ in range(_UPDATES):
        before = clip
        clip = last
        outside = tl.sum(tl.where(magnitudes > clip, 1.0, 0.0))
        total = tl.sum(tl.where(magnitudes > clip, magnitudes, 0.0))
        last = total / (noise * (nonzero - outside) + outside) + 0.0 / outside + 0.0 * clip
    tl.store(result + row, before)
    tl.store(result + count + row, clip)
    tl.store(result + 2 * count + row, last)
