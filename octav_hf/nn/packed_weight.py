"""A weight stored as integers and one scale per row, in place of its quantizer."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..functional.bit_packing import pack_bits, packed_row_bytes, unpack_bits
from ..functional.fake_quantize import fake_quantize
from ..functional.grid import step_size
from ..functional.rows import statistics_dtype, to_rows
from .fake_quantize import FakeQuantize
from .recording import refuse_recording


class PackedWeight(FakeQuantize):
    """A quantized weight as packed integers and the step of each row's grid; replaces the ``weight_quantizer``.

    Args:
        quantizer: the weight's quantizer, whose settings are kept.
        weight: the weight, for its shape, dtype and device; its values are not read.
        is_frozen: whether clips stay frozen after unpacking.

    Attributes:
        packed_data: buffer, ``[rows * bytes per row]``, see ``functional.bit_packing``. One-dimensional, so that it
            cannot be confused with a float weight, which has at least two dimensions.
        scale: buffer, ``[rows]`` (one row if the clip is for the whole tensor), float32, or float64 for a float64
            weight; does not follow the model's dtype.
        shape, dtype: of the dequantized weight; ``dtype`` follows the model's.
    """

    packed_data: Tensor
    scale: Tensor

    def __init__(self, quantizer: FakeQuantize, weight: Tensor, is_frozen: bool):
        super().__init__(**quantizer.init_kwargs)
        self.shape = weight.shape
        self.dtype = weight.dtype
        self._is_frozen = is_frozen
        rows, self._row_length = self._to_rows(weight).shape
        size = rows * packed_row_bytes(self._row_length, self.num_bits)
        packed_dtype = torch.int8 if self.num_bits == 8 else torch.uint8
        self.register_buffer("packed_data", torch.empty(size, dtype=packed_dtype, device=weight.device))
        self.register_buffer("scale", torch.empty(rows, dtype=statistics_dtype(weight.dtype), device=weight.device))

    @property
    def is_frozen(self) -> bool:
        """Whether the weight's clips were frozen when it was packed."""
        return self._is_frozen

    @classmethod
    @torch.no_grad()
    def pack(cls, quantizer: FakeQuantize, weight: Tensor) -> "PackedWeight":
        """The packed form of ``quantizer(weight)``, without loss; ``ValueError`` if ``weight`` holds NaN or Inf."""
        weight = weight.detach()
        packed = cls(quantizer, weight, is_frozen=quantizer.is_frozen)
        clip = quantizer.compute_clip(weight)
        quantized = fake_quantize(weight, clip, quantizer.num_bits, gradient=quantizer.gradient_estimator)
        step = step_size(clip.to(packed.scale.dtype), quantizer.num_bits, signed=True)
        # Rounding errors are too small to change the integer.
        levels = (quantized.to(step.dtype) / torch.where(step > 0, step, 1)).round().to(torch.int8)
        packed.packed_data.copy_(pack_bits(packed._to_rows(levels).contiguous(), quantizer.num_bits).flatten())
        packed.scale.copy_(step.flatten())
        if not torch.equal(packed.dequantize(), quantized):
            raise ArithmeticError(f"{quantizer.name}: its integers and scales do not give the quantized weight exactly")
        return packed

    def forward(self, x: Tensor, call_index: int = 0) -> Tensor:
        """``x``, dequantized rows of the weight, unchanged; ``RuntimeError`` if the call is being recorded."""
        refuse_recording(self, x, dynamic=False)
        return x

    def compute_clip(self, x: Tensor, signed: bool | None = None) -> Tensor:
        """The clips that the weight was packed with, shaped as by the clipping rule; ``x`` is not read."""
        clip = self.scale / step_size(torch.ones_like(self.scale), self.num_bits, signed=True)
        if self.dim is None:
            return clip.reshape(())
        return clip.view([1 if d in self._along_a_row else size for d, size in enumerate(self.shape)])

    def dequantize(self) -> Tensor:
        """The weight, of ``shape`` and ``dtype``, contiguous."""
        rows = self._values(self._packed_rows, self.scale)
        order = [d for d in range(len(self.shape)) if d not in self._along_a_row] + self._along_a_row
        inverse = sorted(order, key=order.__getitem__)
        return rows.reshape([self.shape[d] for d in order]).permute(inverse).contiguous()

    def dequantize_rows(self, index: Tensor) -> Tensor:
        """Rows of a weight with one scale per index of its first dimension: ``[*index.shape, row]``."""
        return self._values(self._packed_rows[index], self.scale[index])

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, packed {list(self.shape)} {self.dtype}"

    def _values(self, packed: Tensor, scale: Tensor) -> Tensor:
        levels = unpack_bits(packed, self.num_bits, self._row_length)
        return (levels.to(scale.dtype) * scale.unsqueeze(-1)).to(self.dtype)

    @property
    def _packed_rows(self) -> Tensor:
        return self.packed_data.view(len(self.scale), packed_row_bytes(self._row_length, self.num_bits))

    @property
    def _along_a_row(self) -> list[int]:
        """The weight's dimensions that share a scale."""
        if self.dim is None:
            return list(range(len(self.shape)))
        return sorted(d % len(self.shape) for d in ((self.dim,) if isinstance(self.dim, int) else self.dim))

    def _to_rows(self, weight: Tensor) -> Tensor:
        return weight.reshape(1, -1) if self.dim is None else to_rows(weight, self.dim)[0]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.scale.device)).dtype
        return super()._apply(fn, recurse)
