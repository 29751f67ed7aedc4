"""OCTAV: the clipping scalar that minimises the modelled quantization error, by Newton-Raphson (Sakr et al. 2022)."""

import torch
from torch import Tensor

from .._utils.escaping import shown
from . import fixed_point
from .all_ranks import AllRanks, check_whole
from .error import lower_error
from .grid import check_num_bits, noise_factor
from .kernels import cpu
from .registry import register_clip_rule
from .rows import Dim, check_floating, finite_range, statistics_dtype, to_rows
from .tail_sums import TailSums, TailSumsOfAllRanks

_MAX_UPDATES = 100  # after which the recursion counts as a cycle of more than two values
_MAX_UPDATES_FROM_GUESS = 8  # near the fixed point it converges soon, or alternates
_MAX_ITERATIONS = 1000  # that can be asked for
_TOLERANCE_IN_EPS = 8  # relative change at convergence


def _check_options(max_iterations: int | None = None) -> None:
    is_integer = isinstance(max_iterations, int) and not isinstance(max_iterations, bool)
    if max_iterations is not None and not (is_integer and 0 <= max_iterations <= _MAX_ITERATIONS):
        raise ValueError(
            f"max_iterations must be an integer from 0 to {_MAX_ITERATIONS}, or None to run to the fixed point, got "
            f"{shown(max_iterations)}; 10 is the paper's"
        )


@register_clip_rule("octav", check_options=_check_options)
@torch.no_grad()
def octav_clip(
    x: Tensor,
    num_bits: int,
    *,
    signed: bool = True,
    dim: Dim = None,
    ranks: AllRanks | None = None,
    max_iterations: int | None = None,
) -> Tensor:
    r"""MSE-optimal clipping scalar(s) by the recursion of Eq. 6 (unsigned: Appendix A).

    .. math::
        s_{n+1} = \frac{\sum |x| \, 1\{|x| > s_n\}}
                       {c \sum 1\{0 < |x| \le s_n\} + \sum 1\{|x| > s_n\}},
        \qquad s_1 = \frac{\sum |x|}{\sum 1\{|x| > 0\}}, \qquad c = 4^{-B}/3 \ (\text{unsigned: } 4^{-B}/12)

    Exact zeros carry no noise and are left out, and so are negative values on an unsigned grid, which become zero.

    The derivative of the modelled error, :math:`h(s) = c s \sum 1\{0<|x|\le s\} - \sum (|x|-s) 1\{|x|>s\}`, increases
    with s, so its sign changes once, usually at the recursion's fixed point. Where many elements share one magnitude, h
    can jump over zero there, and the recursion alternates between a value below and one above: then the one with the
    lower measured error (``quantization_error``) is returned, or the smaller one. In the rare longer cycles, the
    magnitude at which h changes sign is returned.

    Args:
        x: float16, bfloat16, float32 or float64, any shape, any strides, any device.
        num_bits: bits B, 2 to 8.
        signed: two's-complement or unsigned grid.
        dim: dimension(s) that share a scalar; ``None`` for one scalar for the whole tensor.
        ranks: ``AllRanks(x, ...)``, for the clip of the tensor whose parts are the ranks' ``x``; about five small
            collectives. Only with ``dim=None``.
        max_iterations: number of updates from s_1, 0 to 1000 (10 in the paper, which at 8 bits stops about 0.4 %
            short); ``None`` runs to the fixed point, to within 5e-5 at worst (``fixed_point.py``).

    Returns:
        The clip s >= 0 in the units of ``x``, float32 (float64 for float64 input), without gradient; 0-dim for
        ``dim=None``, otherwise the shape of ``x`` with ``dim`` of size 1. Rows that are empty or all zero give 0; a row
        whose nonzero values share one magnitude gives that magnitude up to rounding.

    Raises:
        TypeError: ``x`` is not floating point.
        ValueError: ``x`` holds NaN or Inf; ``num_bits``, ``dim`` or ``max_iterations`` is out of range, or ``dim`` is
            given with ``ranks``.
    """
    check_floating(x, "octav_clip")
    check_num_bits(num_bits)
    _check_options(max_iterations)
    rows, shape = to_rows(x, dim)
    if ranks is not None:
        check_whole(dim, "octav_clip")
    if (rows.numel() if ranks is None else ranks.numel) == 0:
        return torch.zeros(shape, dtype=statistics_dtype(x.dtype), device=x.device)
    if ranks is not None:
        return _clip_of_all_ranks(rows, num_bits, signed, max_iterations, ranks).reshape(())
    clip = None if max_iterations is not None else _fast(rows, num_bits, signed)
    if clip is None:
        tail = TailSums(rows, signed, *finite_range(x, "octav_clip"))
        clip = _recursion(tail, rows, num_bits, signed, max_iterations)
    elif (missing := clip.isnan()).any():
        tail = TailSums(rows[missing], signed, *finite_range(x, "octav_clip"))
        clip[missing] = _recursion(tail, rows[missing], num_bits, signed)
    return clip.reshape(shape)


def _fast(rows: Tensor, num_bits: int, signed: bool) -> Tensor | None:
    """The fixed points by kernels or by search, NaN where they prove none; ``None`` if they do not support ``rows``."""
    clip = cpu.fixed_points(rows, num_bits, signed) if cpu.is_supported(rows) else None
    if clip is None and fixed_point.is_worthwhile(rows):
        clip = fixed_point.fixed_points(rows, num_bits, signed)
    return clip


def _clip_of_all_ranks(
    rows: Tensor, num_bits: int, signed: bool, max_iterations: int | None, ranks: AllRanks
) -> Tensor:
    """The clip, ``[1]``, of a row distributed over the ranks, whose part is ``rows``, ``[1, n]``."""
    if max_iterations is not None:
        return _recursion(TailSumsOfAllRanks(rows, signed, ranks), rows, num_bits, signed, max_iterations)
    # Each update is a collective, and few are needed from the mean of the ranks' own clips.
    tail = TailSumsOfAllRanks(rows, signed, ranks, guess=octav_clip(rows, num_bits, signed=signed))
    # Above every magnitude Eq. 6 would start over from 0.
    highest = max(-ranks.low if signed else 0.0, ranks.high) * (1 - 2.0**-20)
    clip = tail.guess.clamp(max=highest) * tail.unit
    for _ in range(_MAX_UPDATES_FROM_GUESS):
        after = _update(tail, clip, noise_factor(num_bits, signed))
        if bool((after - clip).abs() <= _TOLERANCE_IN_EPS * torch.finfo(clip.dtype).eps * clip):
            return after / tail.unit
        clip = after
    return _recursion(tail, rows, num_bits, signed, ranks=ranks)


def _update(tail: TailSums, clip: Tensor, noise: float) -> Tensor:
    """One step of Eq. 6 for each row. A clip with nothing above it, which Eq. 6 would turn into 0, stays."""
    total, outside = tail.above(clip)
    denominator = noise * (tail.nonzero - outside) + outside
    return torch.where(outside > 0, total / denominator.clamp(min=noise), clip)


def _recursion(
    tail: TailSums,
    rows: Tensor,
    num_bits: int,
    signed: bool,
    max_iterations: int | None = None,
    ranks: AllRanks | None = None,
) -> Tensor:
    """Eq. 6 for each row, ``[rows]``, from s_1 on; see ``octav_clip`` for the result."""
    noise = noise_factor(num_bits, signed)
    clip = tail.total / tail.nonzero.clamp(min=1)
    if max_iterations is not None:
        for _ in range(max_iterations):
            clip = _update(tail, clip, noise)
        return clip / tail.unit
    tolerance = _TOLERANCE_IN_EPS * torch.finfo(clip.dtype).eps
    before = torch.full_like(clip, -1)
    for _ in range(_MAX_UPDATES):
        after = _update(tail, clip, noise)
        settled = (after - clip).abs() <= tolerance * clip
        alternates = ~settled & ((after - before).abs() <= tolerance * clip)
        done = settled | alternates
        if done.all():
            break
        # Rows that are done keep their last two values.
        before, clip = torch.where(done, before, clip), torch.where(done, clip, after)
    if alternates.any():
        first, second = clip[alternates] / tail.unit, after[alternates] / tail.unit
        after[alternates] = lower_error(rows[alternates], first, second, num_bits, signed, ranks) * tail.unit
    return (after if done.all() else torch.where(done, after, _sign_change(tail, noise))) / tail.unit


def _sign_change(tail: TailSums, noise: float) -> Tensor:
    """The sign change of the modelled error's derivative, where updates stop raising the clip, by bisection."""
    low, high = torch.zeros_like(tail.total), tail.total
    while True:
        middle = (low + high) / 2
        if ((middle == low) | (middle == high)).all():
            return high
        rises = _update(tail, middle, noise) > middle
        low, high = torch.where(rises, middle, low), torch.where(rises, high, middle)
