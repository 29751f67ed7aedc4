"""The clip with the lowest quantization error, measured with the two's-complement grid instead of modelled."""

import torch
from torch import Tensor

from .error import rows_errors
from .grid import check_num_bits, noise_factor
from .kernels.operations import operation
from .octav import fixed_point, octav_of_rows
from .registry import register_clip_rule
from .rows import Dim, Sign, check_floating, checked_clips, clips_of, empty_clips, magnitude
from .table import Tails, empty_clip, is_finite, magnitude_table, uses_table

# The highest of the candidates near OCTAV's clip, in its units, by bits: Eq. 6 underestimates the dead zone and the
# clipped top, more so at few bits.
HIGHEST = {2: 8.0, 3: 4.0, 4: 2.6, 5: 2.2, 6: 2.0, 7: 1.8, 8: 1.8}
LOWEST = 0.85
NEAR, FAR, FINE = 40, 15, 16  # candidates near OCTAV's clip, from there to the top, and around the best of them
NEAR_OF_ROW, FAR_OF_ROW, FINE_OF_ROW = 12, 6, 6  # of a short row, each of which reads it


def mse_of_table(table: Tensor, num_bits: int, signed: Tensor) -> Tensor:
    """``mse_clip`` of a tensor with this magnitude table; arguments and result as in ``octav_of_table``."""
    return lowest_error_of_table(table, num_bits, signed)


@register_clip_rule("mse", of_table=mse_of_table, tensor_sign=True)
@torch.no_grad()
def mse_clip(x: Tensor, num_bits: int, *, signed: Sign = True, dim: Dim = None, skip: Tensor | None = None) -> Tensor:
    r"""Clipping scalar(s) with nearly the lowest measured squared error, by a search around OCTAV's clip.

    Eq. 4 models the error at a clip s, with step :math:`\Delta = s\,2^{1-B}` (unsigned :math:`s\,2^{-B}`), as
    :math:`\Delta^2/12` for each value inside and :math:`(|x|-s)^2` for each outside. The grid's error is

    .. math::
        E(\Delta) = \sum_x (x - \Delta k(x))^2
        = \sum_x x^2 - 2\Delta \sum_{j=1}^{k_+} G_+((j-\tfrac12)\Delta)
        - 2\Delta \sum_{j=1}^{-k_-} G_-((j-\tfrac12)\Delta)

    with :math:`k(x) = \min(\max(\mathrm{round}(x/\Delta), k_-), k_+)`, :math:`k_- = -2^{B-1}, k_+ = 2^{B-1}-1`
    (unsigned 0 and :math:`2^B-1`), and :math:`G_\pm(t) = \sum (\pm x - t)_+`. It differs from the model in the dead
    zone, where :math:`|x| < \Delta/2` has the error :math:`x^2` for any clip, which matters where most values are
    small, as in a softmax; at the upper end, which is :math:`s-\Delta` and not s; and in the ripple of a coarse grid.
    E has no closed-form minimum and may have several local ones. So it is computed for candidates from 0.85 of OCTAV's
    clip to the one whose highest grid value is the largest magnitude, and for some around the best of them: from the
    magnitude table (``table.py``), or of rows of less than 32768 elements, for fewer candidates, from the elements.

    The error is within 0.5 % of the best of a sweep of 1000 clips, and that of short rows within 2 % (5 % at 8 bits),
    on the tensors of a fine-tuned MiniLM and on synthetic ones (README); there is no guarantee.

    Arguments, result and errors as in ``octav_clip``, without ``max_iterations``. A row of zeros gives 0.
    """
    check_floating(x, "mse_clip")
    check_num_bits(num_bits)
    return clips_of(mse_of_rows, x, dim, num_bits, signed=signed, skip=skip, name="mse_clip")


@operation("(Tensor table, int num_bits, Tensor signed) -> Tensor", empty_clip)
def lowest_error_of_table(table: Tensor, num_bits: int, signed: Tensor) -> Tensor:
    """The clip with the lowest E among the candidates; see ``mse_of_table``."""
    octav = fixed_point(Tails.of(table, signed), noise_factor(num_bits, signed))
    levels = 2.0**num_bits / (signed + 1)
    steps = torch.arange(1, 2**num_bits, dtype=torch.float64, device=table.device)
    one = signed.new_ones(1)
    positive = Tails(table, torch.cat([one, ~one]).to(torch.int64))
    negative = Tails(table, torch.cat([~one, one & signed]).to(torch.int64))

    def gains(clips: Tensor) -> Tensor:
        """``sum(x^2) - E`` of each clip."""
        step = clips[:, None] / levels
        thresholds = (steps - 0.5) * step
        total = positive.excess(thresholds) * (steps < levels) + negative.excess(thresholds) * (steps <= levels)
        return 2 * step[:, 0] * total.sum(dim=1)

    top = torch.maximum(positive.top, negative.top) * levels / (levels - 1)
    clips, ratios = _candidates(octav, top, num_bits, NEAR, FAR)
    best, ratio = _at(gains(clips).argmax(), clips, ratios)
    clips = best * ratio ** torch.linspace(-1, 1, FINE + 1, dtype=torch.float64, device=table.device)
    (best,) = _at(gains(clips).argmax(), clips)
    return torch.where(is_finite(table), torch.where(octav > 0, best, octav), torch.nan).to(torch.float32)


@operation("(Tensor rows, int num_bits, Tensor signed, Tensor? skip, bool check) -> Tensor", empty_clips)
def mse_of_rows(rows: Tensor, num_bits: int, signed: Tensor, skip: Tensor | None, check: bool) -> Tensor:
    """The clips with the lowest error of rows, ``[rows, n]``: ``[rows]``; see ``mse_clip``."""
    if uses_table(rows):
        found = [lowest_error_of_table(magnitude_table(row), num_bits, signed) for row in rows]
        return checked_clips(torch.stack(found), skip, check)
    octav = octav_of_rows(rows, num_bits, signed, skip, check)
    # On an unsigned grid a negative value has the same error for every clip, which may drown the rest.
    values = torch.where(signed, rows, rows.clamp(min=0))
    levels = 2.0**num_bits / (signed + 1)
    top = magnitude(values, True).amax(dim=1) * (levels / (levels - 1)).to(octav.dtype)
    clips, ratios = _candidates(octav, top, num_bits, NEAR_OF_ROW, FAR_OF_ROW)
    best, ratio = _at(rows_errors(values, clips, num_bits, signed).argmin(dim=0), clips, ratios)
    shares = torch.linspace(-1, 1, FINE_OF_ROW + 1, dtype=octav.dtype, device=rows.device)
    clips = best * ratio ** shares[:, None]
    (best,) = _at(rows_errors(values, clips, num_bits, signed).argmin(dim=0), clips)
    return checked_clips(torch.where(octav > 0, best, octav), skip, check)


def _candidates(octav: Tensor, top: Tensor, num_bits: int, near: int, far: int) -> tuple[Tensor, Tensor]:
    """Clips to try, ``[near + far + 1, ...]`` for OCTAV's clips, ``[...]``, and the ratio of each to the next."""
    start = torch.where(octav > 0, octav, 1)
    share = torch.linspace(0, 1, near, dtype=octav.dtype, device=octav.device)
    near_ratio = (HIGHEST[num_bits] / LOWEST) ** (1 / (near - 1))
    factors = LOWEST * (HIGHEST[num_bits] / LOWEST) ** share
    clips = factors.view(-1, *[1] * octav.dim()) * start
    last = clips.select(0, near - 1)
    far_ratio = (top.to(octav.dtype) / last).clamp(min=1) ** (1 / far)
    powers = torch.arange(1, far + 1, dtype=octav.dtype, device=octav.device).view(-1, *[1] * octav.dim())
    clips = torch.cat([clips, last * far_ratio**powers, start[None]])
    near_ratios = torch.full_like(clips.narrow(0, 0, near), near_ratio)
    ratios = torch.cat([near_ratios, far_ratio.expand(far, *octav.shape).clamp(min=near_ratio), near_ratios[:1]])
    return clips, ratios


def _at(index: Tensor, *values: Tensor) -> list[Tensor]:
    """The entries of values, ``[k, ...]``, with this index, ``[...]``, in the first dimension."""
    return [part.gather(0, index[None])[0] for part in values]
