"""Group-wise quantization: consecutive elements along the contracted dimension of a matmul share a clip."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .rows import Dim, to_rows


class Groups(NamedTuple):
    """How a dimension of a tensor is split into groups; the last group is shorter if ``size`` does not divide it.

    Group clips have one dimension more than the tensor: the split dimension becomes ``[..., groups, 1, ...]``.

    Args:
        size: elements per group.
        dim: dimension(s) whose elements share a clip; the last of them is split. ``None`` for all dimensions.
    """

    size: int
    dim: Dim

    def shape(self, x: Tensor) -> tuple[int, ...]:
        """Shape of ``x`` split into groups, with the last group padded to ``size``; clips broadcast to it."""
        dim = self._last(x)
        return (*x.shape[:dim], -(-x.shape[dim] // self.size), self.size, *x.shape[dim + 1 :])

    def are_even(self, x: Tensor) -> bool:
        """Whether all groups have ``size`` elements."""
        return x.shape[self._last(x)] % self.size == 0

    def cut(self, x: Tensor) -> list[Tensor]:
        """``x`` as ``[..., groups, size, ...]``; a shorter last group follows as a second tensor."""
        dim = self._last(x)
        length = x.shape[dim]
        rest = length % self.size
        parts = []
        if rest < length or not length:
            whole = x if rest == 0 else x.narrow(dim, 0, length - rest)
            parts.append(whole.reshape(*x.shape[:dim], length // self.size, self.size, *x.shape[dim + 1 :]))
        if rest:
            parts.append(x.narrow(dim, length - rest, rest).unsqueeze(dim))
        return parts

    def shape_of_clips(self, x: Tensor) -> tuple[int, ...]:
        """Shape of the result of ``clips``."""
        shared = self._shared(x)
        return tuple(1 if dim in shared else size for dim, size in enumerate(self.shape(x)))

    def clips(self, x: Tensor, rule: Callable[[Tensor, tuple[int, ...]], Tensor]) -> Tensor:
        """The clips of the groups of ``x``; ``rule(x, dims)`` returns the clips of a tensor, reduced over ``dims``."""
        found = [rule(part, self._shared(x)) for part in self.cut(x)]
        return found[0] if len(found) == 1 else torch.cat(found, dim=self._last(x))

    def map(self, x: Tensor, clip: Tensor, function: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Apply ``function(part, clips)`` to each result of ``cut``; concatenate the results to the shape of ``x``."""
        last, parts = self._last(x), self.cut(x)
        clips = clip.split([part.shape[last] for part in parts], dim=last - x.dim() - 1)
        results = [function(*both).flatten(last, last + 1) for both in zip(parts, clips, strict=True)]
        return results[0] if len(results) == 1 else torch.cat(results, dim=last)

    def rows(self, x: Tensor) -> list[Tensor]:
        """Matrices with one group per row; the shorter last groups are in a second matrix."""
        return [to_rows(part, self._shared(x))[0] for part in self.cut(x)]

    def of_elements(self, clip: Tensor, x: Tensor) -> Tensor:
        """Expand group clips along the split dimension, so that they broadcast to ``x``."""
        dim = self._last(x) - x.dim()
        # Not index_select: Inductor reads out of bounds where a dynamic size is smaller than a group.
        return clip.squeeze(dim).repeat_interleave(self.size, dim).narrow(dim, 0, x.shape[dim])

    def _dims(self, x: Tensor) -> list[int]:
        """The dimensions whose elements share a clip, sorted."""
        if self.dim is None:
            return list(range(x.dim()))
        return sorted(dim % x.dim() for dim in ((self.dim,) if isinstance(self.dim, int) else self.dim))

    def _last(self, x: Tensor) -> int:
        """The dimension that is split."""
        return self._dims(x)[-1]

    def _shared(self, x: Tensor) -> tuple[int, ...]:
        """The dimensions of the results of ``cut`` whose elements share a clip."""
        *others, last = self._dims(x)
        return (*others, last + 1)
