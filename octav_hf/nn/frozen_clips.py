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
        clips: in the units of the operand, one for each use of it in one forward pass of its module.
        lowest: where the unsigned grid begins: at 0, or shifted to a value below.
    """

    signed: bool
    clips: tuple[Clip, ...]
    lowest: float = 0.0


class ClipObserver:
    """Adds up the dynamic clips of one quantizer, by use and by sign."""

    def __init__(self) -> None:
        self._sums: dict[tuple[int, bool], float | Tensor] = {}
        self._counts: dict[tuple[int, bool], int] = {}
        self._lowest = 0.0
        self._uses: set[int] = set()
        self._uses_so_far = 0

    def record(self, use: int, clips: Mapping[bool, float | Tensor], count: int = 1, lowest: float = 0.0) -> None:
        """Add one call.

        Args:
            use: which use of the operand in one forward pass of its module, from 0; a 0 begins the next forward pass.
            clips: signed (True) or not -> the clip on that grid: each grid that is possible as far as this tensor
                goes. A number, or the sum of ``count`` observations as a float64 tensor. None for a tensor without
                values, which says nothing about clips.
            count: how many observations, one for each batch element.
            lowest: where the unsigned grid begins.

        Raises:
            ValueError: the clips have another shape than those before.
        """
        for signed, clip in clips.items():
            before, now = (_shape(value) for value in (self._sums.get((use, signed), clip), clip))
            if before != now:
                raise ValueError(f"clips of shape {now}, after those of shape {before}")
        if use == 0 and self._uses_so_far:
            self._uses.add(self._uses_so_far)
        self._uses_so_far = use + 1
        self._lowest = min(self._lowest, lowest)
        for signed, clip in clips.items():
            self._sums[use, signed] = self._sums.get((use, signed), 0.0) + clip
            self._counts[use, signed] = self._counts.get((use, signed), 0) + count

    @property
    def uses(self) -> set[int]:
        """How many uses the forward passes had; one number unless they differ."""
        return self._uses | ({self._uses_so_far} if self._uses_so_far else set())

    def mean(self) -> FrozenClips | None:
        """The mean clip of each use; unsigned if all calls allowed it. ``None`` if a use had no values, or none ran.

        The mean over all calls, and for clips of heads or channels over all batch elements of all calls. A shifted grid
        begins at the lowest value of all calls.
        """
        uses = range(max(self.uses, default=0))
        # A tensor with a negative value has no unsigned clip, and one that may be either has both.
        signed = any(self._counts.get((use, True), 0) > self._counts.get((use, False), 0) for use in uses)
        if not uses or any((use, signed) not in self._sums for use in uses):
            return None
        clips = tuple(_mean(self._sums[use, signed], self._counts[use, signed]) for use in uses)
        return FrozenClips(signed, clips, 0.0 if signed else self._lowest)


def _shape(clip: float | Tensor) -> tuple[int, ...]:
    return tuple(clip.shape) if isinstance(clip, Tensor) else ()


def _mean(total: float | Tensor, count: int) -> Clip:
    return as_clip((total / count).tolist()) if isinstance(total, Tensor) else total / count
