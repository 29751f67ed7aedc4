"""The clip of the lowest measured error: of what the two's-complement grid really does, not of a model of it."""

import math

import torch
from torch import Tensor

from .all_ranks import AllRanks, check_whole
from .error import rows_errors
from .grid import check_num_bits
from .kernels import cpu
from .octav import octav_clip
from .registry import register_clip_rule
from .rows import Dim, check_floating, finite_range, magnitude, statistics_dtype, to_rows

# Candidates in units of OCTAV's clip, by bits. Eq. 6 takes the dead zone and the clipped top for less than they are,
# the more so the fewer the bits.
_COARSE = {
    2: (1.0, 1.2, 1.44, 1.9, 2.8, 4.2, 6.3),
    3: (0.9, 1.0, 1.1, 1.2, 1.5, 2.1, 2.9),
    4: (0.92, 1.0, 1.05, 1.12, 1.25, 1.55, 2.0),
    5: (0.93, 1.0, 1.03, 1.08, 1.16, 1.3, 1.6),
    6: (0.94, 0.97, 1.0, 1.03, 1.06, 1.12, 1.25),
    7: (0.96, 1.0, 1.03, 1.07, 1.11, 1.16, 1.22),
    8: (0.97, 1.0, 1.03, 1.06, 1.1, 1.16, 1.22),
}
# Those above, up to the largest magnitude, lie a step apart, or more where that takes too many; then some between them.
_STEP, _MOST_STEPS, _BETWEEN_STEPS = 1.5, 8, (-0.5, -0.25, 0.25, 0.5)
# Then in units of the best one so far.
_FINE = ((0.9, 0.95, 1.05, 1.1), (0.97, 0.985, 1.015, 1.03))


@register_clip_rule("mse")
@torch.no_grad()
def mse_clip(
    x: Tensor, num_bits: int, *, signed: bool = True, dim: Dim = None, ranks: AllRanks | None = None
) -> Tensor:
    r"""Clipping scalar(s) of nearly the lowest measured squared error, searched from OCTAV's clip on.

    Eq. 4 models the error at a clip s, with step :math:`\Delta = s\,2^{1-B}` (unsigned :math:`s\,2^{-B}`), as
    :math:`\Delta^2/12` for each value inside and :math:`(|x|-s)^2` for each outside. What the grid does is

    .. math::
        E(\Delta) = \sum_x (x - \Delta k(x))^2, \qquad k(x) = \min(\max(\mathrm{round}(x/\Delta), k_-), k_+)

    with :math:`k_- = -2^{B-1}, k_+ = 2^{B-1}-1` (unsigned 0 and :math:`2^B-1`). The two differ in the dead zone, where
    :math:`|x| < \Delta/2` has the error :math:`x^2` whatever the clip is, which matters where most values are small,
    as in a softmax; at the upper end, which is :math:`s-\Delta` and not s; and in the ripple of a grid of few levels.
    E has no closed minimum and, unlike the model, may have several: a far outlier clipped, or on the grid. So E itself
    is measured: at OCTAV's clip times a few factors, at clips from there up to the one whose highest level is the
    largest magnitude, and then closer and closer to the best of them.

    On the tensors of a fine-tuned MiniLM and on synthetic ones the error is within 2 % (3 bits and less: 5 %) of the
    best of a sweep of 1000 clips (README); there is no guarantee for every tensor. On a CPU compiled code measures the
    candidates (``mse_cpu.cpp``): of a tensor of more than 16384 elements on all outliers and on a sample of the others.
    One that has no more, or such a row, has four candidates from 4 bits on, and others only where one of the highest of
    these is the best; the error of a row of a few dozen elements may then be several percent above the lowest.

    Arguments, result and errors as ``octav_clip``; with ``ranks`` it takes three messages more. There is no
    ``max_iterations``. A row of zeros gives 0.
    """
    check_floating(x, "mse_clip")
    check_num_bits(num_bits)
    rows, shape = to_rows(x, dim)
    if ranks is not None:
        check_whole(dim, "mse_clip")
        start = octav_clip(x, num_bits, signed=signed, ranks=ranks).reshape(1)
        return _search(rows, start, num_bits, signed, ranks).reshape(())
    if rows.numel() == 0:
        return torch.zeros(shape, dtype=statistics_dtype(x.dtype), device=x.device)
    clip = cpu.lowest_errors(rows, num_bits, signed, _COARSE[num_bits], _FINE) if cpu.is_supported(rows) else None
    if clip is None:
        finite_range(x, "mse_clip")
        clip = _clips(rows, num_bits, signed)
    elif (missing := clip.isnan()).any():
        finite_range(x, "mse_clip")
        clip[missing] = _clips(rows[missing], num_bits, signed)
    return clip.reshape(shape)


def _clips(rows: Tensor, num_bits: int, signed: bool) -> Tensor:
    """The clip of each of ``[rows, n]``, whose values are finite, without the compiled search."""
    return _search(rows, octav_clip(rows, num_bits, signed=signed, dim=1)[:, 0], num_bits, signed)


def _search(rows: Tensor, octav: Tensor, num_bits: int, signed: bool, ranks: AllRanks | None = None) -> Tensor:
    """The candidate with the lowest error for each of ``[rows, n]``, given OCTAV's clips, ``[rows]``.

    With ``ranks`` for one row, ``[1, n]``, of which each rank has a part; a collective.
    """
    if not signed:
        rows = magnitude(
            rows, signed
        )  # the error of a negative value is the same for every clip, and may drown the rest
    if ranks is not None:
        peak = torch.full_like(octav, max(ranks.high, -ranks.low) if signed else max(ranks.high, 0.0))
    else:
        peak = magnitude(rows, signed).amax(dim=1)
    levels = 2.0 ** (num_bits - 1 if signed else num_bits)
    start = torch.where(octav > 0, octav, 1)  # a row of zeros stays one
    last, top = start * _COARSE[num_bits][-1], peak * (levels / (levels - 1))
    gap = (top / last).clamp(min=1).log()
    steps = (gap / math.log(_STEP)).ceil().clamp(1, _MOST_STEPS)
    candidates = [start * factor for factor in _COARSE[num_bits]]
    candidates += [last * (gap * (k / steps).clamp(max=1)).exp() for k in range(1, int(steps.max()))]
    candidates.append(top)

    def best_of(clips: list[Tensor]) -> Tensor:
        stacked = torch.stack(clips)
        errors = rows_errors(rows, stacked, num_bits, signed, ranks)
        return stacked.gather(0, errors.argmin(dim=0, keepdim=True))[0]

    best = best_of(candidates)
    between = torch.where(best > last, gap / steps, 0)
    best = best_of([best, *(best * (between * share).exp() for share in _BETWEEN_STEPS)])
    for factors in _FINE:
        best = best_of([best, *(best * factor for factor in factors)])
    return torch.where(octav > 0, best, octav)
