"""Groups: neighbours along the dimension that a product sums over, each with a clip of its own."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .rows import Dim, to_rows


class Groups(NamedTuple):
    """How a dimension of a tensor is cut into groups; if its length is no multiple of ``size``, the last is shorter.

    Clips of groups have one dimension more than the tensor, ``[..., groups, 1, ...]`` where the one that is cut was.

    Args:
        size: elements of a group.
        dim: the dimension(s) whose elements share a clip, the last of which is cut; ``None`` for all.
    """

    size: int
    dim: Dim

    def shape(self, x: Tensor) -> tuple[int, ...]:
        """That of ``x`` cut into groups of ``size``, the last one included: clips broadcast to it."""
        dim = self._last(x)
        return (*x.shape[:dim], -(-x.shape[dim] // self.size), self.size, *x.shape[dim + 1 :])

    def are_even(self, x: Tensor) -> bool:
        """Whether all groups have ``size`` elements."""
        return x.shape[self._last(x)] % self.size == 0

    def cut(self, x: Tensor) -> list[Tensor]:
        """``x`` as ``[..., groups, size, ...]``, without what is left over, and that as one group of its own length."""
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
        """Of what ``clips`` gives."""
        shared = self._shared(x)
        return tuple(1 if dim in shared else size for dim, size in enumerate(self.shape(x)))

    def clips(self, x: Tensor, rule: Callable[[Tensor, tuple[int, ...]], Tensor]) -> Tensor:
        """The clips of the groups of ``x`` by ``rule(x, dims)``, which gives those of a tensor over ``dims``."""
        found = [rule(part, self._shared(x)) for part in self.cut(x)]
        return found[0] if len(found) == 1 else torch.cat(found, dim=self._last(x))

    def rows(self, x: Tensor) -> list[Tensor]:
        """The parts of ``x`` that share a clip as rows of matrices, those of the shorter last group in another one."""
        return [to_rows(part, self._shared(x))[0] for part in self.cut(x)]

    def of_elements(self, clip: Tensor, x: Tensor) -> Tensor:
        """The clips of groups of ``x``, of each of its elements: they broadcast to it."""
        dim = self._last(x)
        group = torch.arange(x.shape[dim], dtype=torch.int64, device=x.device) // self.size
        return clip.squeeze(dim - x.dim()).index_select(dim - x.dim(), group)

    def _dims(self, x: Tensor) -> list[int]:
        """The dimensions that share a clip, in order."""
        if self.dim is None:
            return list(range(x.dim()))
        return sorted(dim % x.dim() for dim in ((self.dim,) if isinstance(self.dim, int) else self.dim))

    def _last(self, x: Tensor) -> int:
        """The dimension that is cut."""
        return self._dims(x)[-1]

    def _shared(self, x: Tensor) -> tuple[int, ...]:
        """The dimensions of what ``cut`` gives that share a clip."""
        *others, last = self._dims(x)
        return (*others, last + 1)
