"""Activation quantizer whose clips are computed over the global batch."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._utils.torch_private import has_values
from ..functional.registry import RULES_OF_TABLES
from ..functional.rows import Sign, check_floating, not_finite_error, statistics_dtype, to_rows
from ..functional.table import has_negative_bin, is_finite, magnitude_table
from .all_ranks import gather, own_rank, sum_and_gather
from .codes import Grid
from .fake_quantize import FakeQuantize
from .function_modes import outside_function_modes
from .pooled_values import clip_of_range, clip_of_table, pooled_range, value_range


class _Pooled(NamedTuple):
    """Statistics of the tensor whose parts are on the ranks."""

    table: Tensor | None  # magnitude table, for a rule that uses it
    bounds: Tensor  # lowest and highest value, [2] float64; with a table only the lowest one, if requested
    has_negative: Tensor  # bool []


class SynchronizedFakeQuantize(FakeQuantize):
    """``FakeQuantize`` whose clip and sign are computed over the tensors of all ranks of the default process group.

    The clip of a whole tensor takes one collective: the sum of the ranks' magnitude tables (1 MiB), or for ``"max"``
    their ranges. Tables hold integers, and small tensors and single processes use them too, so clip and sign are the
    same bit for bit however the values are split over ranks. Float64 values are counted as float32. A rank's tensor may
    be empty. An asymmetric grid takes a second collective for the clip of ``x - offset``.

    With ``dim``, a clip belongs to a part on one rank, such as a token or a head; ``dim`` must not include the batch
    dimension. If the sign depends on the values, one collective shares their range and the mean clip, which decides
    about an offset. If the sign is fixed, nothing is communicated.

    On the CPU, NaN or Inf on one rank raises an error on all ranks, or on that rank alone if nothing is communicated.
    On other devices it makes a shared clip NaN on all ranks. The rule must be able to combine ranks
    (``register_clip_rule``).
    """

    is_synchronized = True

    @property
    def cache_key(self) -> tuple[Any, ...]:
        return (*super().cache_key, "all ranks")

    @torch.no_grad()
    @outside_function_modes
    def is_signed(self, x: Tensor) -> Sign:
        return self._pool(x).has_negative if self.signed is None else self.signed

    @torch.no_grad()
    @outside_function_modes
    def compute_clip(self, x: Tensor, signed: Sign | None = None, skip: Tensor | None = None) -> Tensor:
        if self.is_granular:
            return super().compute_clip(x, signed, skip)
        pooled = self._pool(x)
        return self._clip_of(pooled, self._sign(pooled) if signed is None else signed, x)

    @torch.no_grad()
    @outside_function_modes
    def dynamic_grid(self, x: Tensor) -> Grid:
        if self.is_granular:
            return super().dynamic_grid(x) if self.signed is not None else self._grid_of_parts(x)
        asymmetric = self.asymmetric and self.signed is None
        pooled = self._pool(x, lowest=asymmetric)
        signed = self._sign(pooled)
        clip = self._clip_of(pooled, signed, x)
        if not asymmetric:
            return Grid(signed, clip)
        low = pooled.bounds.select(0, 0).to(clip.dtype)
        shifted = signed & (-low <= clip)
        offset = torch.where(shifted, low, 0)
        clip_from_offset = self.compute_clip(x.to(offset.dtype) - offset, signed=False)
        return Grid(signed & shifted.logical_not(), torch.where(shifted, clip_from_offset, clip), offset)

    def _grid_of_parts(self, x: Tensor) -> Grid:
        check_floating(x, self._rule_name)
        own, error = [value_range(to_rows(x, None)[0]).flatten()], None
        if self.asymmetric:
            try:
                clip = super().compute_clip(x, signed=True)
            except ValueError as raised:  # raised after the collective, for which the other ranks wait
                clip, error = torch.full((1,), torch.nan, dtype=torch.float64, device=x.device), raised
            own.append(torch.stack([clip.sum(dtype=torch.float64), own[0].new_full((), clip.numel())]))
        gathered = gather(torch.cat(own))
        if error is not None:
            raise error
        self._check(_is_range(gathered) & gathered.isnan().any(dim=1).logical_not(), x)
        low = gathered.select(1, 0).amin()
        negative = low < 0
        if not self.asymmetric:
            return Grid(negative, super().compute_clip(x, negative))
        total, number = gathered.narrow(1, 2, 2).sum(dim=0)
        shifted = negative & (-low * number <= total)
        offset = torch.where(shifted, low, 0).to(clip.dtype)
        signed = negative & shifted.logical_not()
        clip_of_grid = super().compute_clip(x.to(offset.dtype) - offset, signed, skip=signed)
        return Grid(signed, torch.where(signed, clip, clip_of_grid), offset)

    def _pool(self, x: Tensor, lowest: bool = False) -> _Pooled:
        """Statistics of the tensor whose parts are the ranks' ``x``, by one collective."""
        check_floating(x, self._rule_name)
        values, _ = to_rows(x.detach(), None)
        if self.clip not in RULES_OF_TABLES:
            ranges = gather(value_range(values).flatten())
            self._check(_is_range(ranges), x)
            bounds = pooled_range(ranges)
            return _Pooled(None, bounds, bounds.select(0, 0) < 0)
        own = magnitude_table(values.float() if values.dtype == torch.float64 else values)
        low = value_range(values).select(1, 0) if lowest else torch.zeros(1, dtype=torch.float64, device=x.device)
        table, gathered = sum_and_gather(own, torch.cat([is_finite(own).double().view(1), low]))
        valid, lows = gathered.unbind(dim=1)
        self._check(valid > 0, x)
        return _Pooled(table, lows.amin(dim=0, keepdim=True), has_negative_bin(table))

    def _clip_of(self, pooled: _Pooled, signed: Sign, x: Tensor) -> Tensor:
        if pooled.table is None:
            clip = clip_of_range(self, pooled.bounds, signed)
        else:
            clip = clip_of_table(self, pooled.table, signed)
        clip = clip.to(statistics_dtype(x.dtype))
        self.remember(clip)
        return clip

    def _sign(self, pooled: _Pooled) -> Sign:
        return pooled.has_negative if self.signed is None else self.signed

    @property
    def _rule_name(self) -> str:
        return f"{self.name or 'FakeQuantize'}: {self.clip}_clip"

    def _check(self, is_finite: Tensor, x: Tensor) -> None:
        """Raise ``ValueError`` on every rank unless all of ``is_finite``, ``[ranks]``, is true.

        This checks only on the CPU, where reading does not synchronize.
        """
        if x.device.type != "cpu" or torch.compiler.is_compiling() or not has_values(x) or bool(is_finite.all()):
            return
        if is_finite[own_rank()]:
            ranks = ", ".join(map(str, (~is_finite).nonzero().flatten().tolist()))
            raise ValueError(
                f"{self._rule_name}: the part of x on rank {ranks} holds NaN or Inf, so it has no clipping scalar; see "
                "the error on that rank"
            )
        if bool(x.isfinite().all()):
            raise ValueError(
                f"{self._rule_name}: x of shape {tuple(x.shape)} holds values beyond the range of float32, in which "
                "the values of all ranks are counted; scale x down"
            )
        raise not_finite_error(x, self._rule_name)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, synchronized"


def _is_range(ranges: Tensor) -> Tensor:
    """Whether the first two columns of ``[ranks, ...]`` are finite bounds, or those of no values: bool ``[ranks]``."""
    low, high = ranges.select(1, 0), ranges.select(1, 1)
    return (low.isfinite() & high.isfinite()) | (low > high)
