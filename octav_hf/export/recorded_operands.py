"""Quantizers and attention that ``torch.onnx.export`` records as ONNX operators for integers.

ONNX Runtime fuses QuantizeLinear → DequantizeLinear → MatMul, with a DequantizeLinear for the other operand, into one
integer matmul. Its left operand must be uint8; ONNX Runtime converts int8 codes if only one matmul uses them.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..functional import integer_range
from ..functional.grid import step_size
from ..inference.integer_attention import IntegerAttentionArithmetic
from ..nn.attention.match_matmul import COLUMNS, ROWS, OperandDims
from ..nn.codes import Codes
from ..nn.fake_quantize import FakeQuantize

OPSET = 21


class RecordedQuantizer(FakeQuantize):
    """A quantizer with frozen clips, recorded as Clip (below 8 bits), QuantizeLinear and DequantizeLinear.

    ``record`` changes the class of an existing quantizer in place.

    Attributes:
        counts_from_lowest: whether the codes of a signed grid are uint8, counted from the lowest integer, or int8.
        steps: step of the grid for each call index; empty if clips are granular.
        start: lowest value of an asymmetric grid, otherwise 0.
    """

    counts_from_lowest: bool
    steps: list[float]
    start: float

    @staticmethod
    def record(quantizer: FakeQuantize, counts_from_lowest: bool) -> None:
        """Convert ``quantizer`` in place."""
        frozen = quantizer.frozen
        assert frozen is not None
        quantizer.__class__ = RecordedQuantizer
        assert isinstance(quantizer, RecordedQuantizer)
        quantizer.counts_from_lowest = counts_from_lowest
        steps = step_size(frozen.clips.float(), quantizer.num_bits, frozen.signed)
        quantizer.steps = steps.tolist() if steps.dim() == 1 else []
        quantizer.start = 0.0 if frozen.offset is None else float(frozen.offset)

    def forward(self, x: Tensor, call_index: int = 0, codes: torch.dtype | None = None, known: Any = None) -> Any:
        """As ``FakeQuantize.forward``; codes are int8, or uint8 counted from the lowest integer."""
        if known is not None:
            return known
        quantized = self._quantize(x - self.start if self.start else x, call_index)
        if codes is not None:
            return quantized
        x = dequantized(quantized)
        if quantized.is_granular:
            x = x * quantized.scale
        return x + self.start if self.start else x

    def _quantize(self, x: Tensor, call_index: int) -> Codes:
        frozen = self.frozen
        assert frozen is not None
        low, high = integer_range(self.num_bits, frozen.signed)
        if self.steps:
            step = self.steps[call_index]
            scale = value_of_1 = constant(step or 1.0, torch.float32)
            bounds = step * low, step * high
        else:  # the result of the matmul is scaled
            scale = step_size(self._frozen_grid(frozen, x, call_index).clip, self.num_bits, frozen.signed)
            value_of_1, bounds = constant(1.0, torch.float32), (float(low), float(high))
            x = x / (scale + (scale == 0))
        if self.num_bits < 8 or bounds[1] == 0:
            x = torch.clamp(x, *bounds)
        dtype = torch.uint8 if self.counts_from_lowest or low == 0 else torch.int8
        zero_point = constant(-low if dtype == torch.uint8 else 0, dtype)
        integers = onnx("QuantizeLinear", (x, value_of_1, zero_point), dtype, x.shape)
        return Codes(integers, low, self.num_bits, scale, None)


def dequantized(codes: Codes) -> Tensor:
    """The dequantized values of codes; if scales are granular, the integers as floats."""
    scale = constant(1.0, torch.float32) if codes.is_granular else codes.scale
    inputs = codes.integers, scale, zero_point(codes)
    return onnx("DequantizeLinear", inputs, torch.float32, codes.integers.shape)


def zero_point(codes: Codes) -> Tensor:
    """The code of the integer 0, ``[]``."""
    return constant(-codes.lowest if codes.integers.dtype == torch.uint8 else 0, codes.integers.dtype)


class RecordedAttention(IntegerAttentionArithmetic):
    """Attention matmuls of dequantized operands; granular scales are applied to the result."""

    def _multiply(
        self,
        product: Callable[[Tensor, Tensor], Tensor],
        left: Codes,
        right: Codes,
        dims: tuple[OperandDims, OperandDims],
        factor: float = 1.0,
    ) -> Tensor:
        result = product(dequantized(left), dequantized(right))
        for codes in (left, right):
            if codes.is_granular and dims != (ROWS, COLUMNS):
                raise NotImplementedError(
                    "to_onnx: with static clips per head or channel, only attention that uses torch.matmul can be "
                    "exported to ONNX; leave activation_granularity out"
                )
            result = result * codes.scale if codes.is_granular else result
        return result if factor == 1.0 else result * factor


def constant(value: float, dtype: torch.dtype) -> Tensor:
    """A constant, ``[]``."""
    return torch.tensor(value, dtype=dtype, device="cpu")


def onnx(
    name: str,
    inputs: Sequence[Tensor],
    dtype: torch.dtype,
    shape: Sequence[Any],
    attributes: dict[str, Any] | None = None,
) -> Tensor:
    """Record an ONNX operator whose result has this dtype and shape."""
    return torch.onnx.ops.symbolic(name, inputs, attributes, dtype=dtype, shape=shape, version=OPSET)
