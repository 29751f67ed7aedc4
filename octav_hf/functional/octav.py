"""OCTAV: the clipping scalar that minimises the modelled quantization error (Eq. 6 of Sakr et al. 2022)."""

from collections.abc import Callable

import torch
from torch import Tensor

from .._utils.escaping import shown
from .grid import check_num_bits, noise_factor
from .kernels.operations import operation
from .registry import register_clip_rule
from .rows import Dim, Sign, check_floating, clips_of, operation_of_rows, scaled_magnitudes
from .table import Tails, empty_clip, is_finite

_MAX_ITERATIONS = 1000


def _check_options(max_iterations: int | None = None) -> None:
    is_integer = isinstance(max_iterations, int) and not isinstance(max_iterations, bool)
    if max_iterations is not None and not (is_integer and 0 <= max_iterations <= _MAX_ITERATIONS):
        raise ValueError(
            f"max_iterations must be an integer from 0 to {_MAX_ITERATIONS}, or None to run to the fixed point, got "
            f"{shown(max_iterations)}; the paper uses 10"
        )


def octav_of_table(table: Tensor, num_bits: int, signed: Tensor, max_iterations: int | None = None) -> Tensor:
    """``octav_clip`` of a magnitude table: float32 ``[]``, NaN if a counted value is not finite.

    Args:
        table: int64, from ``magnitude_table``, or the sum of the tables of a tensor's parts.
        num_bits, max_iterations: as in ``octav_clip``.
        signed: bool ``[]``.
    """
    if max_iterations is None:
        return fixed_point_of_table(table, num_bits, signed)
    return updates_of_table(table, num_bits, signed, max_iterations)


@register_clip_rule("octav", check_options=_check_options, of_table=octav_of_table, tensor_sign=True)
def octav_clip(
    x: Tensor,
    num_bits: int,
    *,
    signed: Sign = True,
    dim: Dim = None,
    skip: Tensor | None = None,
    max_iterations: int | None = None,
) -> Tensor:
    r"""MSE-optimal clipping scalar(s) by the recursion of Eq. 6 (unsigned: Appendix A).

    .. math::
        s_{n+1} = \frac{\sum |x| \, 1\{|x| > s_n\}}
                       {c \sum 1\{0 < |x| \le s_n\} + \sum 1\{|x| > s_n\}},
        \qquad s_1 = \frac{\sum |x|}{\sum 1\{|x| > 0\}}, \qquad c = 4^{-B}/3 \ (\text{unsigned: } 4^{-B}/12)

    Exact zeros have no rounding noise and are left out, as are negative values on an unsigned grid, which become zero.

    At the fixed point, the derivative of the modelled error,

    .. math::
        h(s) = c\,s \sum 1\{0<|x|\le s\} - \sum (|x|-s)\, 1\{|x|>s\},

    which increases with s, changes its sign. It is computed without iteration: for rows of fewer than 32768 elements
    exactly, from their sorted magnitudes; for longer rows from their magnitude table (``table.py``), with a relative
    error of at most 1e-4 (2e-4 at 8 bits, where few values are above the clip; 3e-3 where all values differ by less
    than 3 %, or are below 1e-37). Where many elements share one magnitude, h may jump over zero there; then Eq. 6 has
    no fixed point and alternates, and the clip is that magnitude.

    Args:
        x: float16, bfloat16, float32 or float64, any shape, any strides, any device that has float64.
        num_bits: bits B, 2 to 8.
        signed: ``True`` for the two's-complement grid, ``False`` for the unsigned one; or a bool tensor ``[]`` on the
            device of ``x``.
        dim: dimension(s) whose elements share a clip; ``None`` for one clip for the whole tensor.
        skip: bool ``[]`` on the device of ``x``; if true, ``x`` is not read and the clips are 0.
        max_iterations: number of updates from s_1, 0 to 1000 (the paper uses 10, which at 8 bits ends about 0.4 %
            below the fixed point); ``None`` for the fixed point.

    Returns:
        The clip s >= 0 in the units of ``x``, float32 (float64 for float64 input), without gradient; 0-dim for
        ``dim=None``, otherwise the shape of ``x`` with ``dim`` of size 1. Empty and all-zero rows give 0. The clip of
        a row of 32768 elements or more does not depend on the order of the elements or the number of threads, bit for
        bit. On an accelerator (a check would synchronize) and in a compiled graph, a row with NaN or Inf gives NaN.

    Raises:
        TypeError: ``x`` is not floating point.
        ValueError: ``x`` is on the CPU and holds NaN or Inf; ``num_bits``, ``dim`` or ``max_iterations`` is out of
            range.
    """
    check_floating(x, "octav_clip")
    check_num_bits(num_bits)
    _check_options(max_iterations)
    if max_iterations is None:
        return clips_of(octav_of_rows, x, dim, num_bits, signed, skip, name="octav_clip")
    return clips_of(updates_of_rows, x, dim, num_bits, signed, skip, max_iterations, name="octav_clip")


@operation("(Tensor table, int num_bits, Tensor signed) -> Tensor", empty_clip)
def fixed_point_of_table(table: Tensor, num_bits: int, signed: Tensor) -> Tensor:
    """The fixed point of Eq. 6 for a magnitude table; see ``octav_of_table``."""
    return torch.where(is_finite(table), fixed_point(Tails(table, signed), num_bits, signed), torch.nan).float()


def fixed_point(tails: Tails, num_bits: int, signed: Tensor) -> Tensor:
    """The clip at which h changes its sign, ``[]`` float64; 0 if all magnitudes are 0."""
    noise = noise_factor(num_bits, signed)
    clip = tails.crossing(lambda s, count, excess: noise * s * (tails.nonzero - count) - excess)
    return torch.where(tails.nonzero > 0, clip, 0.0)


@operation_of_rows(fixed_point_of_table)
def octav_of_rows(rows: Tensor, num_bits: int, signed: Tensor) -> Tensor:
    """The fixed points of Eq. 6 for ``[rows, n]``: ``[rows]``; see ``octav_clip``."""
    magnitudes, unit = scaled_magnitudes(rows, signed)
    magnitudes = magnitudes.sort(dim=1, descending=True).values
    noise = noise_factor(num_bits, signed)
    nonzero = (magnitudes > 0).sum(dim=1, keepdim=True)
    # If the k largest magnitudes, with sum S_k, are above the clip s, then h(s) = c s (N - k) - (S_k - k s).
    count = torch.arange(1, rows.shape[1] + 1, dtype=torch.float64, device=rows.device)
    total = magnitudes.cumsum(dim=1)
    at_magnitudes = noise * magnitudes * (nonzero - count + 1) - (total - count * magnitudes)
    # The sign changes at the smallest magnitude where h is not negative (by a jump), or below it.
    risen = (at_magnitudes >= 0) & (magnitudes > 0)
    index = ((count * risen).amax(dim=1, keepdim=True) - 1).clamp(min=0).to(torch.int64)
    count, total, magnitude = index + 1, total.gather(1, index), magnitudes.gather(1, index)
    return (torch.minimum(magnitude, total / (noise * (nonzero - count) + count)) * unit)[:, 0]


def updates_of_table(table: Tensor, num_bits: int, signed: Tensor, updates: int) -> Tensor:
    """``updates`` updates of Eq. 6 from s_1, for a magnitude table: ``[]``."""
    tails = Tails(table, signed)
    noise = noise_factor(num_bits, signed)
    clip = _updated(lambda clip: [part.sum(dim=0) for part in tails.above(clip)], tails.nonzero, noise, updates)
    return torch.where(is_finite(table), clip, torch.nan).float()


@operation_of_rows(options=", int updates")
def updates_of_rows(rows: Tensor, num_bits: int, signed: Tensor, updates: int) -> Tensor:
    """As ``updates_of_table``, for ``[rows, n]``: ``[rows]``."""
    magnitudes, unit = scaled_magnitudes(rows, signed)

    def above(clips: Tensor) -> list[Tensor]:
        return [part.sum(dim=1, keepdim=True) for part in (magnitudes > clips, (magnitudes - clips).clamp(min=0))]

    nonzero = (magnitudes > 0).sum(dim=1, keepdim=True)
    return (_updated(above, nonzero, noise_factor(num_bits, signed), updates) * unit)[:, 0]


def _updated(above: Callable[[Tensor], list[Tensor]], nonzero: Tensor, noise: Tensor | float, updates: int) -> Tensor:
    """``updates`` updates of Eq. 6 from s_1; ``above(clips)`` returns count and excess of the magnitudes above."""
    clips = nonzero.double() * 0
    clips = above(clips)[1] / nonzero.clamp(min=1)  # s_1
    for _ in range(updates):
        count, excess = above(clips)
        # If no magnitude is above the clip, Eq. 6 would give 0; keep the clip.
        clips = torch.where(count > 0, (excess + count * clips) / (noise * (nonzero - count) + count), clips)
    return clips
