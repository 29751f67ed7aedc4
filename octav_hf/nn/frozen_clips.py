"""Clips that no longer follow the data, and how they come from observed ones: the mean over all calls."""

from collections.abc import Hashable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .._utils.torch_private import has_values, version_counter
from .function_modes import outside_function_modes


class FrozenClips(NamedTuple):
    """The grid of an operand as calibration left it.

    Args:
        signed: the two's-complement grid, or the unsigned one.
        clips: in the units of the operand, one for each multiplication of it in one forward pass of its module, and for
            each part that has a clip of its own: ``[calls, *parts]``. Of a weight as the clipping rule gives them.
        offset: where an asymmetric grid begins, ``[]``, negative; ``None`` for other grids.
    """

    signed: bool
    clips: Tensor
    offset: Tensor | None = None


_read = WeakTensorKeyDictionary()  # tensor -> its version, and its values


@outside_function_modes
def values_key(x: Tensor | None) -> Hashable:
    """Equal for tensors of equal dtype, shape and values. They are read once, and again after an in-place write.

    A write through ``.data`` is not noticed, since it is not counted. Of a tensor without values, its identity.
    """
    if x is None or not has_values(x):
        return None if x is None else id(x)
    version = None if x.is_inference() else version_counter(x)
    known = _read.get(x)
    if known is None or known[0] != version:
        known = _read[x] = version, (x.dtype, tuple(x.shape), tuple(x.detach().flatten().tolist()))
    return known[1]


class ClipObserver:
    """Adds up the dynamic clips of one quantizer, by call index and by sign."""

    def __init__(self) -> None:
        self._sums: dict[tuple[int, bool], Tensor] = {}
        self._counts: dict[tuple[int, bool], int] = {}
        self._offset: Tensor | None = None
        self._like: Tensor | None = None
        self._call_counts: set[int] = set()
        self._calls_so_far = 0

    def record(
        self, call_index: int, clips: Mapping[bool, Tensor], count: int, offset: Tensor | None, *, like: Tensor
    ) -> None:
        """Add one call.

        Args:
            call_index: which multiplication of the operand in one forward pass of its module, from 0; a 0 begins the
                next forward pass.
            clips: signed -> the sum of ``count`` clips on that grid, for each grid that this tensor allows;
                ``[*parts]`` as in ``FrozenClips``. Empty for an empty tensor.
            count: the number of batch elements in those sums.
            offset: where the grid begins if it is asymmetric.
            like: a tensor with the dtype and device of clips.

        Raises:
            ValueError: the clips have another shape than those before.
        """
        sums = {signed: clip.detach().cpu().double() for signed, clip in clips.items()}
        for signed, clip in sums.items():
            before, now = (tuple(value.shape) for value in (self._sums.get((call_index, signed), clip), clip))
            if before != now:
                raise ValueError(f"clips of shape {now}, after those of shape {before}")
        if call_index == 0 and self._calls_so_far:
            self._call_counts.add(self._calls_so_far)
        self._calls_so_far = call_index + 1
        self._like = like.detach()
        if offset is not None:
            low = offset.detach().cpu().double()
            self._offset = low if self._offset is None else torch.minimum(self._offset, low)
        for signed, clip in sums.items():
            total = self._sums.get((call_index, signed))
            self._sums[call_index, signed] = clip if total is None else total + clip
            self._counts[call_index, signed] = self._counts.get((call_index, signed), 0) + count

    @property
    def call_counts(self) -> set[int]:
        """How often a forward pass multiplied the operand; one number unless forward passes differ."""
        return self._call_counts | ({self._calls_so_far} if self._calls_so_far else set())

    @torch.inference_mode(False)
    def mean(self) -> FrozenClips | None:
        """The mean clip of each call index; unsigned if all calls allowed it. ``None`` without values for one of them.

        The mean over all calls, and for clips of heads or channels over all batch elements of all calls, in float64,
        then of the dtype and on the device of the observed clips. An asymmetric grid begins at the lowest value of all
        calls.

        Raises:
            ValueError: the multiplications in one forward pass have clips of different shapes.
        """
        indices = range(max(self.call_counts, default=0))
        # A tensor with a negative value has no unsigned clip, and one that may be either has both.
        signed = any(self._counts.get((index, True), 0) > self._counts.get((index, False), 0) for index in indices)
        if self._like is None or any((index, signed) not in self._sums for index in indices):
            return None
        means = [self._sums[index, signed] / self._counts[index, signed] for index in indices]
        shapes = {tuple(mean.shape) for mean in means}
        if len(shapes) > 1:
            raise ValueError(f"clips of the shapes {sorted(shapes)} in one forward pass")
        offset = None if signed or self._offset is None or not self._offset < 0 else self._offset.to(self._like)
        return FrozenClips(signed, torch.stack(means).to(self._like), offset)
