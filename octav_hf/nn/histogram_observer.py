"""Static clips that are optimal for all calls together: the clipping rule reads the sum of their histograms."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..functional.registry import RULES_OF_TABLES, poolable_rules
from .all_ranks import gather, sum_over_ranks
from .clip_observer import ClipObserver
from .codes import Grid
from .fake_quantize import FakeQuantize
from .frozen_clips import FrozenClips
from .pooled_values import clip_of_range, clip_of_table, pooled_range, value_range
from .sparse_table import SparseTable


class _Parts:
    """Statistics of an operand at one call index, for each part that has its own clip."""

    def __init__(self, shape: tuple[int, ...], with_tables: bool):
        self.shape = shape
        number = math.prod(shape)
        self.ranges = value_range(torch.empty(number, 0, dtype=torch.float64, device="cpu"))  # [parts, 2]
        self.tables = [SparseTable() for _ in range(number if with_tables else 0)]

    def add(self, matrices: Sequence[Tensor]) -> None:
        """Add the values of the parts, which are the rows of ``matrices``."""
        ranges = torch.cat([value_range(rows) for rows in matrices])
        self.ranges = pooled_range(torch.stack([self.ranges, ranges.cpu()]))
        # A rule that needs only ranges has no tables.
        for table, row in zip(self.tables, (row for rows in matrices for row in rows), strict=False):
            table.add(row)


class HistogramObserver(ClipObserver):
    """Counts the values of all calls, per call index and part, and computes one clip for all of them.

    The clips are the same bit for bit, whatever the order of the calls and the split over batches and ranks. The
    clipping rule must be able to combine batches (``register_clip_rule``). Clips are computed on the CPU.

    An asymmetric grid begins at the lowest value of all calls, which is known only at the end, and its clip is that of
    ``x - offset``. To count these values, all calls have to be observed again, unless the rule needs only the range.
    """

    _like: Tensor  # a dynamic clip, for dtype and device; set by the first call

    def __init__(self, quantizer: FakeQuantize):
        super().__init__(quantizer)
        if quantizer.clip not in poolable_rules():
            raise ValueError(
                f"{quantizer.name or 'FakeQuantize'}: the clip {quantizer.clip!r} cannot be computed from a histogram, "
                f'only {", ".join(map(repr, poolable_rules()))} can; write observer="mean"'
            )
        self._has_tables = quantizer.clip in RULES_OF_TABLES
        self._calls: dict[int, _Parts] = {}
        self._offset: Tensor | None = None
        self._is_done = False

    @property
    def may_need_another_pass(self) -> bool:
        """Whether the grid may be asymmetric and the rule needs more than the range."""
        return self._has_tables and self.quantizer.asymmetric and self.quantizer.signed is None

    @torch.inference_mode(False)
    @torch.no_grad()
    def observe(self, x: Tensor, call_index: int, grid: Grid) -> None:
        if self._is_done:
            return
        self.count_call(call_index)
        self._like = grid.clip.detach()
        shape = self.quantizer.parts_of(x)
        if call_index not in self._calls:
            self._calls[call_index] = _Parts(shape, self._has_tables)
        parts = self._calls[call_index]
        self.check_shape(shape, parts.shape)
        values = x.detach() if self._offset is None else x.detach().to(self._offset.dtype) - self._offset
        groups = self.quantizer.active_groups
        shared_dims = len(self.quantizer.frozen_dim or ())
        parts.add([_rows(values, shape, shared_dims)] if groups is None else groups.rows(values))

    @torch.inference_mode(False)
    @torch.no_grad()
    def needs_another_pass(self) -> bool:
        """Whether the grid is asymmetric and the values of ``x - offset`` have not been counted yet."""
        ranges = self._ranges() if self._offset is None and self.may_need_another_pass else None
        offset = None if ranges is None else self._offset_of(ranges)
        self._is_done = offset is None
        if offset is not None:
            self._offset, self._calls = offset, {}
        return offset is not None

    @torch.inference_mode(False)
    @torch.no_grad()
    def frozen(self) -> FrozenClips | None:
        ranges, offset = self._ranges(), self._offset
        if ranges is None:
            return None
        if offset is None and not self._has_tables and self.quantizer.asymmetric and self.quantizer.signed is None:
            offset = self._offset_of(ranges)
            ranges = ranges if offset is None else ranges - offset.cpu()
        signed = self.quantizer.signed
        if signed is None:
            signed = offset is None and bool(ranges[..., 0].min() < 0)
        number = range(ranges.shape[1])
        clips = torch.stack([self._clip(ranges, index, part, signed) for index in self._indices for part in number])
        clips = clips.reshape(len(ranges), *self._calls[0].shape)
        return FrozenClips(signed, clips.to(self._like), offset)

    @property
    def _indices(self) -> range:
        return range(max(self.call_counts, default=0))

    def _ranges(self) -> Tensor | None:
        """Ranges of the values on all ranks, ``[calls, parts, 2]``; ``None`` if a call or a part has no values."""
        if not self._calls:
            return None
        shapes = {self._calls[index].shape for index in self._indices}
        if len(shapes) > 1:
            raise ValueError(f"clips of different shapes in one forward pass: {sorted(shapes)}")
        ranges = torch.stack([self._calls[index].ranges for index in self._indices])
        if self.quantizer.is_synchronized:
            ranges = pooled_range(gather(ranges.to(self._like.device))).cpu()
        return None if bool((ranges[..., 0] > ranges[..., 1]).any()) else ranges

    def _offset_of(self, ranges: Tensor) -> Tensor | None:
        """The lowest value, ``[]``; ``None`` if it is outside the mean signed clip or not negative."""
        low = ranges[..., 0].min()
        if not low < 0:
            return None
        clips = [self._clip(ranges, 0, part, signed=True) for part in range(ranges.shape[1])]
        return low.to(self._like) if -low <= torch.stack(clips).mean() else None

    def _clip(self, ranges: Tensor, index: int, part: int, signed: bool) -> Tensor:
        """The clip of a part, ``[]``, on the CPU."""
        if not self._has_tables:
            return clip_of_range(self.quantizer, ranges[index, part], signed)
        table = self._calls[index].tables[part].dense()
        if self.quantizer.is_synchronized:
            table = sum_over_ranks(table.to(self._like.device)).cpu()
        return clip_of_table(self.quantizer, table, signed)


def _rows(x: Tensor, parts: tuple[int, ...], shared_dims: int) -> Tensor:
    """Reshape ``[*parts, *shared]`` or ``[batch, *parts, *shared]`` to ``[number of parts, values]``."""
    number = math.prod(parts)
    if x.dim() > len(parts) + shared_dims:
        x = x.movedim(0, len(parts))
    return x.reshape(number, -1) if x.numel() else x.new_empty(number, 0)
