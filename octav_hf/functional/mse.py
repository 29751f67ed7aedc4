"""The clip with the lowest quantization error, measured with the two's-complement grid instead of modelled."""

import torch
from torch import Tensor

from .error import rows_errors
from .grid import check_num_bits, noise_factor
from .kernels.operations import operation
from .octav import fixed_point, octav_of_rows
from .registry import register_clip_rule
from .rows import Dim, Sign, check_floating, checked_clips, clips_of, magnitude, operation_of_rows
from .table import Tails, empty_clip, is_finite, magnitude_table, uses_table

# The highest of the candidates near OCTAV's clip, in its units, by bits: Eq. 6 underestimates the dead zone and the
# clipped top, more so at few bits.
HIGHEST = {2: 8.0, 3: 4.0, 4: 2.6, 5: 2.2, 6: 2.0, 7: 1.8, 8: 1.8}
LOWEST = 0.85
NEAR, FAR, FINE = 40, 15, 15  # candidates near OCTAV's clip, from there to the top, and around the best of them
# Of a short row, each of which reads it. Few values are beyond its clip, so that the best is closer to OCTAV's, and
# near the top, which is the highest candidate but for many bits, of which rounding makes one slightly above the best.
LOWEST_OF_ROW = {2: 0.95, 3: 0.92, 4: 0.94, 5: 0.95, 6: 0.96, 7: 0.97, 8: 0.98}
BEYOND_TOP_OF_ROW = {bits: 1.0 if bits <= 4 else 1.03 for bits in HIGHEST}
NEAR_OF_ROW = {2: 8, 3: 8, 4: 4, 5: 4, 6: 8, 7: 8, 8: 4}
FAR_OF_ROW, FINE_OF_ROW = 4, 4


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
    on the tensors of a fine-tuned MiniLM and on synthetic ones (README); there is no guarantee. On short rows of a few
    distinct values, such as integers, which some clips hit exactly, it may be several times the lowest.

    Arguments, result and errors as in ``octav_clip``, without ``max_iterations``. A row of zeros gives 0.
    """
    check_floating(x, "mse_clip")
    check_num_bits(num_bits)
    return clips_of(mse_of_rows, x, dim, num_bits, signed=signed, skip=skip, name="mse_clip")


@operation("(Tensor table, int num_bits, Tensor signed) -> Tensor", empty_clip)
def lowest_error_of_table(table: Tensor, num_bits: int, signed: Tensor) -> Tensor:
    """The clip with the lowest E among the candidates; see ``mse_of_table``."""
    octav = fixed_point(Tails.of(table, signed), noise_factor(num_bits, signed))
    levels = 2.0**num_bits / (signed.double() + 1)
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
    clips, ratios = _candidates(octav, LOWEST, HIGHEST[num_bits] * octav, top, NEAR, FAR)
    best, ratio = _at(gains(clips).argmax(), clips, ratios)
    clips = _between(best, ratio, FINE)
    (best,) = _at(gains(clips).argmax(), clips)
    best = best.clamp(max=torch.finfo(torch.float32).max)
    return torch.where(is_finite(table), torch.where(octav > 0, best, octav), torch.nan).to(torch.float32)


@operation_of_rows("(Tensor rows, int num_bits, Tensor signed, Tensor? skip, bool check) -> Tensor")
def mse_of_rows(rows: Tensor, num_bits: int, signed: Tensor, skip: Tensor | None, check: bool) -> Tensor:
    """The clips with the lowest error of rows, ``[rows, n]``: ``[rows]``; see ``mse_clip``."""
    if uses_table(rows):
        found = [lowest_error_of_table(magnitude_table(row), num_bits, signed) for row in rows]
        return checked_clips(torch.stack(found), skip, check)
    octav = octav_of_rows(rows, num_bits, signed, skip, check)
    # On an unsigned grid a negative value has the same error for every clip, which may drown the rest.
    values = torch.where(signed, rows, rows.clamp(min=0))
    levels = 2.0**num_bits / (signed.to(octav.dtype) + 1)
    top = magnitude(values, True).amax(dim=1) * (levels / (levels - 1))
    last = torch.minimum(HIGHEST[num_bits] * octav, BEYOND_TOP_OF_ROW[num_bits] * top).maximum(1.02 * octav)
    clips, ratios = _candidates(octav, LOWEST_OF_ROW[num_bits], last, top, NEAR_OF_ROW[num_bits], FAR_OF_ROW)
    best, ratio = _at(rows_errors(values, clips, num_bits, signed).argmin(dim=0), clips, ratios)
    clips = _between(best, ratio, FINE_OF_ROW)
    (best,) = _at(rows_errors(values, clips, num_bits, signed).argmin(dim=0), clips)
    return checked_clips(torch.where(octav > 0, best, octav), skip, check)


def _candidates(octav: Tensor, lowest: float, last: Tensor, top: Tensor, near: int, far: int) -> tuple[Tensor, Tensor]:
    """Clips to try, ``[near + far, ...]`` for OCTAV's clips, ``[...]``, and the ratio of each to the next.

    They are ``near`` clips from ``lowest``, in units of OCTAV's, to ``last``, and ``far`` from there to ``top``, where
    this is higher.
    """
    largest = torch.finfo(octav.dtype).max
    ends = (torch.where(octav > 0, clip, 1).to(octav.dtype) for clip in (lowest * octav, last, top))
    first, last, top = (clip.clamp(max=largest) for clip in ends)
    near_ratio = (last / first) ** (1 / (near - 1))
    far_ratio = (top / last).clamp(min=1) ** (1 / far)

    def powers(ratio: Tensor, begin: int, end: int) -> Tensor:
        exponents = torch.arange(begin, end, dtype=octav.dtype, device=octav.device)
        return ratio ** exponents.view(-1, *[1] * octav.dim())

    clips = torch.cat([first * powers(near_ratio, 0, near), last * powers(far_ratio, 1, far + 1)])
    clips = clips.clamp(max=largest)
    ratios = [near_ratio.expand(near, *octav.shape), torch.maximum(far_ratio, near_ratio).expand(far, *octav.shape)]
    return clips, torch.cat(ratios)


def _between(clip: Tensor, ratio: Tensor, count: int) -> Tensor:
    """``clip`` and ``count`` clips between it over and it times ``ratio``: ``[count + 1, ...]``."""
    shares = torch.linspace(-1, 1, count + 2, dtype=clip.dtype, device=clip.device).narrow(0, 1, count)
    clips = torch.cat([clip[None], clip * ratio ** shares.view(-1, *[1] * clip.dim())])
    return clips.clamp(max=torch.finfo(clip.dtype).max)


def _at(index: Tensor, *values: Tensor) -> list[Tensor]:
    """The entries of values, ``[k, ...]``, with this index, ``[...]``, in the first dimension."""
    return [part.gather(0, index[None])[0] for part in values]
