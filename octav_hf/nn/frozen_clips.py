"""Clips that no longer follow the data, and how they come from observed ones: the mean over all calls."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor

Clip: TypeAlias = "float | tuple[Clip, ...]"
"""One number, or one for each head, or for each channel of each head: ``(…, …)``, or ``((…, …), (…, …))``."""


def as_clip(numbers: Any) -> Clip:
    """A number as it is, nested lists of numbers as tuples."""
    return tuple(map(as_clip, numbers)) if isinstance(numbers, list) else float(numbers)


def clip_shape(clip: Clip) -> tuple[int, ...]:
    """How many there are along each dimension; ``()`` for one number."""
    return (len(clip), *clip_shape(clip[0])) if isinstance(clip, tuple) else ()


def clip_numbers(clip: Clip) -> Iterator[float]:
    """The numbers, one after the other."""
    if not isinstance(clip, tuple):
        yield clip
        return
    for part in clip:
        yield from clip_numbers(part)


@dataclass(frozen=True)
class FrozenClips:
    """The grid of an operand as calibration left it.

    Args:
        signed: the two's-complement grid, or the unsigned one.
        clips: in the units of the operand, one for each multiplication of it in one forward pass of its module.
        offset: where the unsigned grid begins: 0, or the negative offset of an asymmetric grid.
    """

    signed: bool
    clips: tuple[Clip, ...]
    offset: float = 0.0


class ClipObserver:
    """Adds up the dynamic clips of one quantizer, by call index and by sign."""

    def __init__(self) -> None:
        self._sums: dict[tuple[int, bool], float | Tensor] = {}
        self._counts: dict[tuple[int, bool], int] = {}
        self._offset = 0.0
        self._call_counts: set[int] = set()
        self._calls_so_far = 0

    def record(
        self, call_index: int, clips: Mapping[bool, float | Tensor], count: int = 1, offset: float = 0.0
    ) -> None:
        """Add one call.

        Args:
            call_index: which multiplication of the operand in one forward pass of its module, from 0; a 0 begins the
                next forward pass.
            clips: signed -> the clip on that grid, for each grid that this tensor allows: a number, or the sum of
                ``count`` clips as a float64 tensor. Empty for an empty tensor.
            count: the number of batch elements in those sums.
            offset: where the unsigned grid begins.

        Raises:
            ValueError: the clips have another shape than those before.
        """
        for signed, clip in clips.items():
            before, now = (_shape(value) for value in (self._sums.get((call_index, signed), clip), clip))
            if before != now:
                raise ValueError(f"clips of shape {now}, after those of shape {before}")
        if call_index == 0 and self._calls_so_far:
            self._call_counts.add(self._calls_so_far)
        self._calls_so_far = call_index + 1
        self._offset = min(self._offset, offset)
        for signed, clip in clips.items():
            self._sums[call_index, signed] = self._sums.get((call_index, signed), 0.0) + clip
            self._counts[call_index, signed] = self._counts.get((call_index, signed), 0) + count

    @property
    def call_counts(self) -> set[int]:
        """How often a forward pass multiplied the operand; one number unless forward passes differ."""
        return self._call_counts | ({self._calls_so_far} if self._calls_so_far else set())

    def mean(self) -> FrozenClips | None:
        """The mean clip of each call index; unsigned if all calls allowed it. ``None`` without values for one of them.

        The mean over all calls, and for clips of heads or channels over all batch elements of all calls. An asymmetric
        grid begins at the lowest value of all calls.
        """
        indices = range(max(self.call_counts, default=0))
        # A tensor with a negative value has no unsigned clip, and one that may be either has both.
        signed = any(self._counts.get((index, True), 0) > self._counts.get((index, False), 0) for index in indices)
        if not indices or any((index, signed) not in self._sums for index in indices):
            return None
        clips = tuple(_mean(self._sums[index, signed], self._counts[index, signed]) for index in indices)
        return FrozenClips(signed, clips, 0.0 if signed else self._offset)


def _shape(clip: float | Tensor) -> tuple[int, ...]:
    return tuple(clip.shape) if isinstance(clip, Tensor) else ()


def _mean(total: float | Tensor, count: int) -> Clip:
    return as_clip((total / count).tolist()) if isinstance(total, Tensor) else total / count
