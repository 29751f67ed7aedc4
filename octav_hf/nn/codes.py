"""The grid of a tensor, and a quantized tensor as integers."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..functional.fake_quantize import integer_codes
from ..functional.grid import range_and_sign, step_size
from ..functional.rows import Sign


class Grid(NamedTuple):
    """A grid for one tensor.

    Args:
        signed: ``True`` for the two's-complement grid, ``False`` for the unsigned one; a bool tensor ``[]`` if it
            depends on the values.
        clip: clipping scalar(s), broadcastable against the tensor; on an asymmetric grid, those of ``x - offset``.
        offset: value of integer 0 on an asymmetric grid, which is unsigned, ``[]``. It is 0 if the values made the grid
            symmetric, and ``None`` if the grid cannot be asymmetric.
    """

    signed: Sign
    clip: Tensor
    offset: Tensor | None = None


class Codes(NamedTuple):
    """A quantized tensor as integers: ``offset + scale * k`` for the integers k of its grid.

    Args:
        integers: k as float32 or float64, or k - lowest as uint8.
        lowest: the lowest integer of the grid, 0 or negative; a tensor ``[]`` if it depends on the values.
        num_bits: bits of the grid.
        scale: step of the grid, broadcastable against the integers; float32, or float64 for float64 data.
        offset: ``[]``; ``None`` for 0.
    """

    integers: Tensor
    lowest: Any
    num_bits: int
    scale: Tensor
    offset: Tensor | None = None

    @classmethod
    def of(cls, x: Tensor, grid: Grid, num_bits: int, dtype: torch.dtype) -> "Codes":
        """The integers of ``fake_quantize(x, grid.clip, num_bits, signed=grid.signed, offset=grid.offset)``.

        NaN, which reaches this only with frozen clips, becomes any integer.
        """
        low, high, sign = range_and_sign(num_bits, grid.signed)
        integers = integer_codes(x.detach(), grid.clip, low, high, sign, grid.offset, dtype)
        lowest = low if sign is None else sign * low
        return cls(integers, lowest, num_bits, step_size(grid.clip, num_bits, grid.signed), grid.offset)

    def map(self, rearrange: Callable[[Tensor], Tensor]) -> "Codes":
        """Apply ``rearrange`` to integers and scales."""
        return self._replace(integers=rearrange(self.integers), scale=rearrange(self.scale))

    @property
    def is_granular(self) -> bool:
        """Whether there is more than one scale."""
        return self.scale.numel() > 1

    @property
    def largest(self) -> int:
        """The largest magnitude that an integer can have."""
        is_signed = not isinstance(self.lowest, Tensor) and self.lowest < 0
        return 2 ** (self.num_bits - 1) if is_signed else 2**self.num_bits - 1
