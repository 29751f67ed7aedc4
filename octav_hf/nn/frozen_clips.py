"""Clips that no longer follow the data, and how they come from observed ones: the mean over all calls."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class FrozenClips:
    """The grid of an operand as calibration left it.

    Args:
        signed: the two's-complement grid, or the unsigned one.
        clips: clipping scalars in the units of the operand, one for each use of it in one forward pass of its module.
    """

    signed: bool
    clips: tuple[float, ...]


class ClipObserver:
    """Adds up the dynamic clips of one quantizer, by use and by sign."""

    def __init__(self) -> None:
        self._sums: dict[tuple[int, bool], float] = {}
        self._calls: dict[tuple[int, bool], int] = {}
        self._uses: set[int] = set()
        self._uses_so_far = 0

    def record(self, use: int, clips: Mapping[bool, float]) -> None:
        """Add one call.

        Args:
            use: which use of the operand in one forward pass of its module, from 0; a 0 begins the next forward pass.
            clips: signed (True) or not -> the clip on that grid: each grid that is possible as far as this tensor
                goes. None for a tensor without values, which says nothing about clips.
        """
        if use == 0 and self._uses_so_far:
            self._uses.add(self._uses_so_far)
        self._uses_so_far = use + 1
        for signed, clip in clips.items():
            self._sums[use, signed] = self._sums.get((use, signed), 0.0) + clip
            self._calls[use, signed] = self._calls.get((use, signed), 0) + 1

    @property
    def uses(self) -> set[int]:
        """How many uses the forward passes had; one number unless they differ."""
        return self._uses | ({self._uses_so_far} if self._uses_so_far else set())

    def mean(self) -> FrozenClips | None:
        """The mean clip of each use; unsigned if all calls allowed it. ``None`` if a use had no values, or none ran."""
        uses = range(max(self.uses, default=0))
        # A tensor with a negative value has no unsigned clip, and one that may be either has both.
        signed = any(self._calls.get((use, True), 0) > self._calls.get((use, False), 0) for use in uses)
        if not uses or any((use, signed) not in self._sums for use in uses):
            return None
        return FrozenClips(signed, tuple(self._sums[use, signed] / self._calls[use, signed] for use in uses))
