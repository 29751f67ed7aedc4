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

_MAX_ITERATIONS = 1000  # that can be asked for


def _check_options(max_iterations: int | None = None) -> None:
    is_integer = isinstance(max_iterations, int) and not isinstance(max_iterations, bool)
    if max_iterations is not None and not (is_integer and 0 <= max_iterations <= _MAX_ITERATIONS):
        raise ValueError(
            f"max_iterations must be an integer from 0 to {_MAX_ITERATIONS}, or None to run to the fixed point, got "
            f"{shown(max_iterations)}; 10 is the paper's"
        )


def octav_of_table(table: Tensor, num_bits: int, signed: Tensor, max_iterations: int | None = None) -> Tensor:
    """``octav_clip`` of a tensor with this magnitude table: float32 ``[]``, NaN if not all values are finite.

    Args:
        table: int64, from ``magnitude_table``, or the sum of those of a tensor's parts.
        num_bits, max_iterations: as in ``octav_clip``.
        signed: bool ``[]``.
    """
    if max_iterations is None:
        return fixed_point_of_table(table, num_bits, signed)
    return updates_of_table(table, num_bits, signed, max_iterations)


@register_clip_rule("octav", check_options=_check_options, of_table=octav_of_table, tensor_sign=True)
@torch.no_grad()
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

    Exact zeros carry no noise and are left out, and so are negative values on an unsigned grid, which become zero.

    The fixed point is where the derivative of the modelled error,

    .. math::
        h(s) = c\,s \sum 1\{0<|x|\le s\} - \sum (|x|-s)\, 1\{|x|>s\},

    which increases with s, changes its sign. It is computed without iteration: of rows of less than 32768 elements from
    their sorted magnitudes, exactly; of longer ones, and of whole tensors of that size, from their magnitude table
    (``table.py``), to within 1e-4 of it, 2e-4 at 8 bits, where few values are above. Where many elements share one
    magnitude, h jumps over zero there, Eq. 6 has no fixed point and alternates, and the clip is that magnitude.

    Args:
        x: float16, bfloat16, float32 or float64, any shape, any strides, any device that has float64.
        num_bits: bits B, 2 to 8.
        signed: two's-complement or unsigned grid; or a bool tensor ``[]`` on the device of ``x`` that says which.
        dim: dimension(s) that share a scalar; ``None`` for one scalar for the whole tensor.
        skip: bool ``[]`` on the device of ``x``; where it is true, ``x`` is not read, and clips are 0.
        max_iterations: number of updates from s_1, 0 to 1000 (10 in the paper, which at 8 bits stops about 0.4 %
            short); ``None`` for the fixed point.

    Returns:
        The clip s >= 0 in the units of ``x``, float32 (float64 for float64 input), without gradient; 0-dim for
        ``dim=None``, otherwise the shape of ``x`` with ``dim`` of size 1. Rows that are empty or all zero give 0. A
        table, and so the clip of a tensor of 32768 elements or more, is the same bit for bit whatever the order of the
        elements and the number of threads. Where reading a value would wait for the device, or in a compiled graph, a
        row with NaN or Inf gives NaN.

    Raises:
        TypeError: ``x`` is not floating point.
        ValueError: ``x``, on the CPU, holds NaN or Inf; ``num_bits``, ``dim`` or ``max_iterations`` is out of range.
    """
    check_floating(x, "octav_clip")
    check_num_bits(num_bits)
    _check_options(max_iterations)
    if max_iterations is None:
        return clips_of(octav_of_rows, x, dim, num_bits, signed, skip, name="octav_clip")
    return clips_of(updates_of_rows, x, dim, num_bits, signed, skip, max_iterations, name="octav_clip")


@operation("(Tensor table, int num_bits, Tensor signed) -> Tensor", empty_clip)
def fixed_point_of_table(table: Tensor, num_bits: int, signed: Tensor) -> Tensor:
    """The fixed point of Eq. 6 of a magnitude table; see ``octav_of_table``."""
    return torch.where(is_finite(table), fixed_point(Tails(table, signed), num_bits, signed), torch.nan).float()


def fixed_point(tails: Tails, num_bits: int, signed: Tensor) -> Tensor:
    """Where h changes its sign, ``[]`` float64; 0 if there are no magnitudes."""
    noise = noise_factor(num_bits, signed)
    clip = tails.crossing(lambda s, count, excess: noise * s * (tails.nonzero - count) - excess)
    return torch.where(tails.nonzero > 0, clip, 0.0)


@operation_of_rows(fixed_point_of_table)
def octav_of_rows(rows: Tensor, num_bits: int, signed: Tensor) -> Tensor:
    """The fixed points of Eq. 6 of rows; see ``octav_clip``."""
    magnitudes, unit = scaled_magnitudes(rows, signed)
    magnitudes = magnitudes.sort(dim=1, descending=True).values
    noise = noise_factor(num_bits, signed)
    nonzero = (magnitudes > 0).sum(dim=1, keepdim=True)
    # With the k largest above it, a clip s has h(s) = c s (N - k) - (S_k - k s).
    count = torch.arange(1, rows.shape[1] + 1, dtype=torch.float64, device=rows.device)
    total = magnitudes.cumsum(dim=1)
    at_magnitudes = noise * magnitudes * (nonzero - count + 1) - (total - count * magnitudes)
    # The smallest magnitude at which h is not negative: the sign changes there, by a jump, or below.
    risen = (at_magnitudes >= 0) & (magnitudes > 0)
    index = ((count * risen).amax(dim=1, keepdim=True) - 1).clamp(min=0).to(torch.int64)
    count, total, magnitude = index + 1, total.gather(1, index), magnitudes.gather(1, index)
    return (torch.minimum(magnitude, total / (noise * (nonzero - count) + count)) * unit)[:, 0]


def updates_of_table(table: Tensor, num_bits: int, signed: Tensor, updates: int) -> Tensor:
    """Eq. 6 as it is written, ``updates`` times from s_1 on, of a magnitude table: ``[]``."""
    tails = Tails(table, signed)
    noise = noise_factor(num_bits, signed)
    clip = _updated(lambda clip: [part.sum(dim=0) for part in tails.above(clip)], tails.nonzero, noise, updates)
    return torch.where(is_finite(table), clip, torch.nan).float()


@operation_of_rows(options=", int updates")
def updates_of_rows(rows: Tensor, num_bits: int, signed: Tensor, updates: int) -> Tensor:
    """As ``updates_of_table``, of the elements of rows themselves."""
    magnitudes, unit = scaled_magnitudes(rows, signed)

    def above(clips: Tensor) -> list[Tensor]:
        return [part.sum(dim=1, keepdim=True) for part in (magnitudes > clips, (magnitudes - clips).clamp(min=0))]

    nonzero = (magnitudes > 0).sum(dim=1, keepdim=True)
    return (_updated(above, nonzero, noise_factor(num_bits, signed), updates) * unit)[:, 0]


def _updated(above: Callable[[Tensor], list[Tensor]], nonzero: Tensor, noise: Tensor | float, updates: int) -> Tensor:
    """``updates`` of Eq. 6, with the count and the excess of the magnitudes above clips."""
    clips = nonzero.double() * 0
    clips = above(clips)[1] / nonzero.clamp(min=1)  # s_1
    for _ in range(updates):
        count, excess = above(clips)
        # With nothing above it, which Eq. 6 would turn into 0, a clip stays.
        clips = torch.where(count > 0, (excess + count * clips) / (noise * (nonzero - count) + count), clips)
    return clips
