"""The clip with the lowest quantization error, measured with the two's-complement grid instead of modelled."""

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

# Candidates in units of OCTAV's clip, by bits. Eq. 6 underestimates the dead zone and the clipped top, more so at few
# bits.
_COARSE = {
    2: (1.0, 1.2, 1.44, 1.9, 2.8, 4.2, 6.3),
    3: (0.9, 1.0, 1.1, 1.2, 1.5, 2.1, 2.9),
    4: (0.92, 1.0, 1.05, 1.12, 1.25, 1.55, 2.0),
    5: (0.93, 1.0, 1.03, 1.08, 1.16, 1.3, 1.6),
    6: (0.94, 0.97, 1.0, 1.03, 1.06, 1.12, 1.25),
    7: (0.96, 1.0, 1.03, 1.07, 1.11, 1.16, 1.22),
    8: (0.97, 1.0, 1.03, 1.06, 1.1, 1.16, 1.22),
}
# Candidates above them, up to the largest magnitude, are spaced by _STEP, or wider to stay within _MAX_STEPS; then
# some between them, in steps from the best.
_STEP, _MAX_STEPS, _BETWEEN_STEPS = 1.5, 8, (-0.5, -0.25, 0.25, 0.5)
# Then candidates in units of the best so far.
_FINE = ((0.9, 0.95, 1.05, 1.1), (0.97, 0.985, 1.015, 1.03))


@register_clip_rule("mse")
@torch.no_grad()
def mse_clip(
    x: Tensor, num_bits: int, *, signed: bool = True, dim: Dim = None, ranks: AllRanks | None = None
) -> Tensor:
    r"""Clipping scalar(s) with nearly the lowest measured squared error, by a search that starts at OCTAV's clip.

    Eq. 4 models the error at a clip s, with step :math:`\Delta = s\,2^{1-B}` (unsigned :math:`s\,2^{-B}`), as
    :math:`\Delta^2/12` for each value inside and :math:`(|x|-s)^2` for each outside. The grid's error is

    .. math::
        E(\Delta) = \sum_x (x - \Delta k(x))^2, \qquad k(x) = \min(\max(\mathrm{round}(x/\Delta), k_-), k_+)

    with :math:`k_- = -2^{B-1}, k_+ = 2^{B-1}-1` (unsigned 0 and :math:`2^B-1`). The two differ in the dead zone, where
    :math:`|x| < \Delta/2` has the error :math:`x^2` for any clip, which matters where most values are small, as in a
    softmax; at the upper end, which is :math:`s-\Delta` and not s; and in the ripple of a coarse grid. E has no
    closed-form minimum and may have several local ones. So E is measured at OCTAV's clip times a few factors, at clips
    from there up to the one whose highest grid value is the largest magnitude, then ever closer to the best of them.

    On the tensors of a fine-tuned MiniLM and on synthetic ones the error is within 2 % (5 % at 2 and 3 bits) of the
    best of a sweep of 1000 clips (README); there is no guarantee. On a CPU compiled code measures the candidates
    (``mse_cpu.cpp``): for rows of more than 16384 elements on all outliers and a sample of the others. Shorter rows
    have four candidates from 4 bits on, and more only if one of the highest is the best; with a few dozen elements
    their error may be several percent above the lowest.

    Arguments, result and errors as in ``octav_clip``, without ``max_iterations``; ``ranks`` takes three collectives
    more. A row of zeros gives 0.
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
    """Clips of ``[rows, n]``, with finite values, without compiled code."""
    return _search(rows, octav_clip(rows, num_bits, signed=signed, dim=1)[:, 0], num_bits, signed)


def _search(rows: Tensor, octav: Tensor, num_bits: int, signed: bool, ranks: AllRanks | None = None) -> Tensor:
    """The candidate with the lowest error for each of ``[rows, n]``, given OCTAV's clips, ``[rows]``.

    With ``ranks``, of a single row that is distributed over the ranks; a collective.
    """
    if not signed:  # a negative value has the same error for every clip, which may drown the rest
        rows = magnitude(rows, signed)
    if ranks is not None:
        peak = torch.full_like(octav, max(ranks.high, -ranks.low) if signed else max(ranks.high, 0.0))
    else:
        peak = magnitude(rows, signed).amax(dim=1)
    levels = 2.0 ** (num_bits - 1 if signed else num_bits)
    start = torch.where(octav > 0, octav, 1)  # a row of zeros stays one
    last, top = start * _COARSE[num_bits][-1], peak * (levels / (levels - 1))
    gap = (top / last).clamp(min=1).log()
    steps = (gap / math.log(_STEP)).ceil().clamp(1, _MAX_STEPS)
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
