"""The clip with the lowest measured quantization error, found by a search around OCTAV's clip."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .error import rows_errors
from .grid import check_num_bits
from .kernels.operations import operation
from .octav import fixed_point, octav_of_rows
from .registry import register_clip_rule
from .rows import Dim, Sign, check_floating, clips_of, magnitude, operation_of_rows
from .table import Tails, empty_clip, is_finite


class Search(NamedTuple):
    """Candidate clips: ``near`` ones around OCTAV's clip, ``far`` ones from there to the top, ``fine`` around the best.

    The top is the clip whose highest grid value is the largest magnitude.
    """

    lowest: float  # lowest near candidate, in units of OCTAV's clip
    highest: float  # highest near candidate, in units of OCTAV's clip
    beyond: float  # upper bound of the highest near candidate, in units of the top
    near: int = 40
    far: int = 15
    fine: int = 15


# Eq. 4 underestimates the error in the dead zone and at the upper end, more so at few bits.
SEARCH_OF_TABLE = {
    bits: Search(0.85, highest, torch.inf)
    for bits, highest in {2: 8.0, 3: 4.0, 4: 2.6, 5: 2.2, 6: 2.0, 7: 1.8, 8: 1.8}.items()
}
# Each candidate reads the row, so there are fewer. The best clip of a short row is closer to OCTAV's, and near the top.
# The near candidates end at the top, or at 5 bits and more slightly above it, because rounding makes that clip best.
SEARCH_OF_ROW = {
    2: Search(0.95, 8.0, 1.0, near=8, far=4, fine=4),
    3: Search(0.92, 4.0, 1.0, near=8, far=4, fine=4),
    4: Search(0.94, 2.6, 1.0, near=4, far=4, fine=4),
    5: Search(0.95, 2.2, 1.03, near=4, far=4, fine=4),
    6: Search(0.96, 2.0, 1.03, near=8, far=4, fine=4),
    7: Search(0.97, 1.8, 1.03, near=8, far=4, fine=4),
    8: Search(0.98, 1.8, 1.03, near=4, far=4, fine=4),
}


@operation("(Tensor table, int num_bits, Tensor signed) -> Tensor", empty_clip)
def lowest_error_of_table(table: Tensor, num_bits: int, signed: Tensor) -> Tensor:
    """``mse_clip`` of a magnitude table; arguments and result as in ``octav_of_table``."""
    tails = Tails(table, signed)
    levels = 2.0**num_bits / (signed.double() + 1)
    numbers = torch.arange(1, 2**num_bits, dtype=torch.float64, device=table.device)
    used = torch.stack([numbers < levels, numbers <= levels])  # one level more for negative values

    def error(clips: Tensor) -> Tensor:
        step = clips / levels
        _, excess = tails.above((numbers - 0.5) * step[:, None])
        return -2 * step * (excess * used[:, None]).sum(dim=(0, 2))

    octav, top = fixed_point(tails, num_bits, signed), tails.top * (levels / (levels - 1))
    clip = lowest_error(error, octav, top, SEARCH_OF_TABLE[num_bits]).clamp(max=torch.finfo(torch.float32).max)
    return torch.where(is_finite(table), clip, torch.nan).float()


@register_clip_rule("mse", of_table=lowest_error_of_table, tensor_sign=True)
def mse_clip(x: Tensor, num_bits: int, *, signed: Sign = True, dim: Dim = None, skip: Tensor | None = None) -> Tensor:
    r"""Clipping scalar(s) with nearly the lowest measured squared error, by a search around OCTAV's clip.

    Eq. 4 models the error of a clip s, with step :math:`\Delta = s\,2^{1-B}` (unsigned :math:`s\,2^{-B}`), as
    :math:`\Delta^2/12` for each value inside and :math:`(|x|-s)^2` for each value outside. The exact error is

    .. math::
        E(\Delta) = \sum_x (x - \Delta k(x))^2
        = \sum_x x^2 - 2\Delta \sum_{j=1}^{k_+} G_+((j-\tfrac12)\Delta)
        - 2\Delta \sum_{j=1}^{-k_-} G_-((j-\tfrac12)\Delta)

    with :math:`k(x) = \min(\max(\mathrm{round}(x/\Delta), k_-), k_+)`, :math:`k_- = -2^{B-1}, k_+ = 2^{B-1}-1`
    (unsigned 0 and :math:`2^B-1`), and :math:`G_\pm(t) = \sum (\pm x - t)_+`. It differs from the model in three
    places: in the dead zone :math:`|x| < \Delta/2`, where the error is :math:`x^2` whatever the clip, which matters
    where most values are small, as after a softmax; at the upper end of the grid, which is :math:`s-\Delta` and not s;
    and in the ripple of a coarse grid. E has no closed-form minimum and may have several local minima. It is therefore
    evaluated for candidates from 0.85 of OCTAV's clip to the clip whose highest grid value is the largest magnitude,
    and then for candidates around the best of these. Long rows are evaluated on their magnitude table (``table.py``),
    rows of fewer than 32768 elements on the elements themselves, with fewer candidates.

    On the tensors of a fine-tuned MiniLM and on synthetic tensors, the error is within 0.5 % of the best of a sweep of
    1000 clips, for short rows within 2 % (5 % at 8 bits); this is not guaranteed. On short rows of a few distinct
    values, such as integers, or of one value that is far above all others, which some clips represent exactly, it may
    be many times the lowest error.

    Arguments, result and errors as in ``octav_clip``, without ``max_iterations``. A row of zeros gives 0. In float16
    the clip is at most 65504, so that no rounded value overflows.
    """
    check_floating(x, "mse_clip")
    check_num_bits(num_bits)
    clips = clips_of(mse_of_rows, x, dim, num_bits, signed, skip, name="mse_clip")
    return clips.clamp(max=torch.finfo(torch.float16).max) if x.dtype == torch.float16 else clips


@operation_of_rows(lowest_error_of_table)
def mse_of_rows(rows: Tensor, num_bits: int, signed: Tensor) -> Tensor:
    """The clips with the lowest error for ``[rows, n]``: ``[rows]``; see ``mse_clip``."""
    octav = octav_of_rows(rows, num_bits, signed, None, False)
    # On an unsigned grid a negative value adds the same error for every clip, which may hide small differences.
    values = torch.where(signed, rows, rows.clamp(min=0))
    levels = 2.0**num_bits / (signed.to(octav.dtype) + 1)
    top = magnitude(values, True).amax(dim=1) * (levels / (levels - 1))
    return lowest_error(lambda clips: rows_errors(values, clips, num_bits, signed), octav, top, SEARCH_OF_ROW[num_bits])


def lowest_error(error: Callable[[Tensor], Tensor], octav: Tensor, top: Tensor, search: Search) -> Tensor:
    """The candidate clips with the lowest error, ``[...]``; 0 where ``octav`` is 0.

    Args:
        error: maps clips ``[k, ...]`` to their errors ``[k, ...]``, up to a constant.
        octav, top: OCTAV's clip and the top, ``[...]``.
    """
    largest = torch.finfo(octav.dtype).max
    near, far = search.near, search.far
    first = search.lowest * octav
    last = torch.minimum(search.highest * octav, search.beyond * top).maximum(1.02 * octav).clamp(max=largest)
    near_step = torch.log2(last / first) / (near - 1)
    far_step = torch.log2(top.clamp(max=largest) / last).clamp(min=0) / far

    def numbers(begin: int, end: int) -> Tensor:
        return torch.arange(begin, end, dtype=octav.dtype, device=octav.device).view(-1, *[1] * octav.dim())

    index = numbers(0, near + far)
    near_clips, far_clips = first * torch.exp2(near_step * index), last * torch.exp2(far_step * (index - (near - 1)))
    clips = torch.where(index < near, near_clips, far_clips).clamp(max=largest)
    best = error(clips).argmin(dim=0, keepdim=True)
    clip, step = clips.gather(0, best), torch.where(best < near, near_step, torch.maximum(near_step, far_step))
    around = clip * torch.exp2(step * (numbers(1, search.fine + 1) * (2 / (search.fine + 1)) - 1))
    clips = torch.cat([clip, around]).clamp(max=largest)
    clip = clips.gather(0, error(clips).argmin(dim=0, keepdim=True))[0]
    return torch.where(octav > 0, clip, octav)
