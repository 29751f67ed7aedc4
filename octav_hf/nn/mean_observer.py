"""Static clips as in the paper: the mean of the dynamic clips of all calls."""

from collections.abc import Mapping

import torch
from torch import Tensor

from .all_ranks import gather
from .clip_observer import ClipObserver
from .codes import Grid
from .fake_quantize import FakeQuantize
from .frozen_clips import FrozenClips


class MeanObserver(ClipObserver):
    """Adds up the upper ends (clip plus offset) of the dynamic grids of one quantizer, per call index and sign."""

    def __init__(self, quantizer: FakeQuantize):
        super().__init__(quantizer)
        self._sums: dict[tuple[int, bool], Tensor] = {}
        self._counts: dict[tuple[int, bool], int] = {}
        self._offset: Tensor | None = None
        self._like: Tensor | None = None

    def observe(self, x: Tensor, call_index: int, grid: Grid) -> None:
        quantizer, signed = self.quantizer, bool(grid.signed)
        numel = torch.tensor(x.numel(), dtype=torch.int64, device=x.device)
        has_values = bool((gather(numel) if quantizer.is_synchronized else numel).any())
        clips = {signed: grid.clip} if has_values else {}
        if clips and quantizer.signed is None and not signed:  # a later tensor may require the signed grid
            clips[True] = quantizer.compute_clip(x, signed=True)
        sums, count = {}, 1
        for sign, clip in clips.items():
            sums[sign], count = clip, 1
            if quantizer.is_granular:
                sums[sign], count = self._sum_over_batch(x, clip)
        offset = grid.offset if grid.offset is not None and bool(grid.offset < 0) else None
        self.record(call_index, sums, count, offset, like=grid.clip)

    def record(
        self, call_index: int, clips: Mapping[bool, Tensor], count: int, offset: Tensor | None, *, like: Tensor
    ) -> None:
        """Add one call.

        Args:
            call_index: as in ``observe``.
            clips: signed -> sum of ``count`` clips on that grid, for each grid that this tensor allows; ``[*parts]`` as
                in ``FrozenClips``. Empty for an empty tensor.
            count: number of samples in the sums.
            offset: lowest value of an asymmetric grid, to which the clip of ``False`` is relative.
            like: a tensor with the dtype and device of clips.

        Raises:
            ValueError: the clips have another shape than those of earlier calls.
        """
        sums = {signed: clip.detach().cpu().double() for signed, clip in clips.items()}
        for signed, clip in sums.items():
            before, now = (tuple(value.shape) for value in (self._sums.get((call_index, signed), clip), clip))
            self.check_shape(now, before)
        self.count_call(call_index)
        self._like = like.detach()
        if offset is not None:
            low = offset.detach().cpu().double()
            self._offset = low if self._offset is None else torch.minimum(self._offset, low)
            sums[False] = sums[False] + count * low
        for signed, clip in sums.items():
            total = self._sums.get((call_index, signed))
            self._sums[call_index, signed] = clip if total is None else total + clip
            self._counts[call_index, signed] = self._counts.get((call_index, signed), 0) + count

    @torch.inference_mode(False)
    def frozen(self) -> FrozenClips | None:
        """The mean clip of each call index; unsigned if all calls allowed it.

        The mean is over all calls, or over all samples of all calls if clips are granular, in float64. An asymmetric
        grid extends from the lowest value of all calls to the mean of their upper ends.
        """
        indices = range(max(self.call_counts, default=0))
        # A tensor with negative values has only a signed clip; one that allows both grids has both clips.
        signed = any(self._counts.get((index, True), 0) > self._counts.get((index, False), 0) for index in indices)
        if self._like is None or any((index, signed) not in self._sums for index in indices):
            return None
        means = [self._sums[index, signed] / self._counts[index, signed] for index in indices]
        shapes = {tuple(mean.shape) for mean in means}
        if len(shapes) > 1:
            raise ValueError(f"clips of different shapes in one forward pass: {sorted(shapes)}")
        clips = torch.stack(means)
        if signed or self._offset is None:
            return FrozenClips(signed, clips.to(self._like))
        return FrozenClips(False, (clips - self._offset).to(self._like), self._offset.to(self._like))

    def _sum_over_batch(self, x: Tensor, clip: Tensor) -> tuple[Tensor, int]:
        """The sum of the clips over the samples of ``x``, float64 ``[*parts_of(x)]``; and the number of samples."""
        parts = self.quantizer.parts_of(x)
        clips = (clip.reshape(-1, *parts) if x.numel() else clip.new_empty(0, *parts)).double()
        total, count = clips.sum(dim=0), len(clips)
        if not self.quantizer.is_synchronized:
            return total, count
        numbers = gather(torch.cat([total.flatten(), total.new_full((1,), count)])).sum(dim=0)
        return numbers[:-1].view_as(total), int(numbers[-1])
