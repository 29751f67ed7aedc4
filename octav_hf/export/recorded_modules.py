"""Quantized modules that ``torch.onnx.export`` records as ONNX's operators for integers.

ONNX Runtime fuses QuantizeLinear → DequantizeLinear → MatMul, with a weight's DequantizeLinear on the other side, into
one integer matmul. It takes codes without a sign on the left; for attention's operands it makes them itself.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..functional import integer_range
from ..nn import FakeQuantize, PackedLayer, PackedWeight, QuantizedAttention, QuantizedLayer

OPSET = 21
INT4, INT8 = "int4_weight", "int8_weight"
"""Names of the buffers with a weight's integers, and of the initializers, by how these are to be stored."""


class RecordedQuantizer(FakeQuantize):
    """A quantizer with frozen clips, recorded as Clip (below 8 bits), QuantizeLinear and DequantizeLinear.

    ``record`` makes one from an existing quantizer by changing its class in place.

    Attributes:
        grids: step, lowest and highest integer for each call in one forward pass.
        lowest_code: what QuantizeLinear makes of the lowest integer: that integer in int8, or 0 in uint8.
        start: where an asymmetric grid begins, or 0.
    """

    grids: list[tuple[float, int, int]]
    lowest_code: int
    start: float

    @staticmethod
    def record(quantizer: FakeQuantize, without_sign: bool) -> None:
        """Convert ``quantizer`` in place; codes are uint8 if ``without_sign``, otherwise int8 on a signed grid."""
        frozen = quantizer.frozen
        assert frozen is not None
        low, high = integer_range(quantizer.num_bits, frozen.signed)
        if frozen.clips.dim() > 1:
            raise NotImplementedError(
                f"{quantizer.name}: its frozen clips of shape {list(frozen.clips.shape)} are for parts of a tensor, and "
                "ONNX's integer matmuls take one scale for an activation; leave it out of activation_granularity"
            )
        quantizer.__class__ = RecordedQuantizer
        assert isinstance(quantizer, RecordedQuantizer)
        quantizer.grids = [(float(clip) / (high + 1), low, high) for clip in frozen.clips.float()]
        quantizer.lowest_code = 0 if without_sign else low
        quantizer.start = 0.0 if frozen.offset is None else float(frozen.offset)

    def quantize(self, x: Tensor, call_index: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """The codes of ``x - start``, their scale ``[]`` and their zero point ``[]``."""
        step, low, high = self.grids[call_index]
        if self.start:
            x = x - self.start
        if self.num_bits < 8 or step == 0:  # QuantizeLinear clamps at 8 bits
            x = torch.clamp(x, step * low, step * high)
        dtype = torch.int8 if self.lowest_code < 0 else torch.uint8
        scale = torch.tensor(step or 1.0, dtype=torch.float32, device="cpu")
        zero_point = torch.tensor(self.lowest_code - low, dtype=dtype, device="cpu")
        return _onnx("QuantizeLinear", (x, scale, zero_point), dtype, x.shape), scale, zero_point

    def dequantized(self, x: Tensor, call_index: int = 0) -> Tensor:
        """The values of the codes of ``x - start``; shape and dtype of ``x``."""
        return _onnx("DequantizeLinear", self.quantize(x, call_index), torch.float32, x.shape)

    def forward(self, x: Tensor, call_index: int = 0) -> Tensor:
        """``x`` on the grid; shape and dtype of ``x``."""
        x = self.dequantized(x, call_index)
        return x + self.start if self.start else x


def record_modules(model: nn.Module) -> None:
    """Have the forward of every quantized module of ``model`` record ONNX's operators, in place and for good."""
    for module in model.modules():
        if isinstance(module, QuantizedLayer):
            _record_layer(module)
        elif isinstance(module, QuantizedAttention):
            for quantizer in module.operand_quantizers.values():
                if isinstance(quantizer, FakeQuantize):
                    # ONNX Runtime converts int8 codes of one matmul, not those that two share, as in DeBERTa. OpenVINO
                    # leaves attention in float where codes without a sign have a zero point.
                    RecordedQuantizer.record(quantizer, without_sign=len(quantizer.frozen.clips) > 1)


def _record_layer(layer: Any) -> None:
    quantizer, inputs = layer.weight_quantizer, layer.operand_quantizers.get("input")
    if isinstance(inputs, FakeQuantize):
        RecordedQuantizer.record(inputs, without_sign=True)
    if not isinstance(quantizer, FakeQuantize):
        return  # a float matmul of what the input's quantizer records
    packed = quantizer if isinstance(quantizer, PackedWeight) else PackedWeight.pack(quantizer, layer.weight)
    if isinstance(inputs, nn.Identity):
        # A float matmul too: ONNX Runtime would quantize the activation by itself if it saw the weight's integers.
        layer.restore()
        layer.weight = nn.Parameter(packed.dequantize(), requires_grad=False)
        return
    if layer.kind not in _FORWARDS:
        raise NotImplementedError(
            f"{packed.name}: {type(layer).__name__} has no form in ONNX; exclude it from quantization"
        )
    codes, scale = packed.codes, packed.scale.float()
    if layer.kind == "linear" and layer.clip_dim == (1,):
        codes = codes.t()  # Transformers' Conv1D has it as [in, out] already
    layer.register_buffer(INT4 if packed.num_bits <= 4 else INT8, codes.contiguous())
    layer.register_buffer("weight_scale", scale.reshape(()) if len(scale) == 1 else scale)
    bias = getattr(layer, "bias", None)
    if isinstance(inputs, RecordedQuantizer) and inputs.start:
        # An offset adds the same to every row of the result.
        sums = inputs.start * packed.scale.double() * codes.sum(0, dtype=torch.float64)
        bias = (sums if bias is None else bias.double() + sums).float()
    layer.register_buffer("recorded_bias", bias if bias is None else bias.detach())
    layer.forward = partial(_FORWARDS[layer.kind], layer)


def _codes(layer: nn.Module) -> Tensor:
    """The integers of a layer's weight."""
    return getattr(layer, INT4, None) if hasattr(layer, INT4) else layer.get_buffer(INT8)


def _linear(layer: Any, x: Tensor) -> Tensor:
    """``nn.Linear.forward``, of rank 3 at least: of rank 2, ONNX Runtime makes it one float operator with the bias."""
    codes, is_matrix = _codes(layer), x.dim() == 2
    x = layer.input_quantizer.dequantized(x.unsqueeze(0) if is_matrix else x)
    along = {"axis": 1} if layer.weight_scale.dim() else {}
    weight = _onnx("DequantizeLinear", (codes, layer.weight_scale), torch.float32, codes.shape, along)
    result = _onnx("MatMul", (x, weight), torch.float32, (*x.shape[:-1], codes.shape[1]))
    result = result.squeeze(0) if is_matrix else result
    if layer.recorded_bias is None:
        return result
    # With a vector as the bias, what has the same shape in every batch would become a float operator, too.
    is_constant = all(isinstance(size, int) for size in x.shape)
    return result + (layer.recorded_bias[(None,) * (result.dim() - 1)] if is_constant else layer.recorded_bias)


def _convolution(layer: Any, x: Tensor) -> Tensor:
    """The forward of a convolution; DequantizeLinear → Conv stays in float unless its result is quantized, too."""
    codes, dims = _codes(layer), layer.weight.dim() - 2
    shape = layer._conv_forward(x, layer.weight, None).shape
    padding = layer._reversed_padding_repeated_twice
    if any(padding):
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x = F.pad(x, padding, mode)
    x, scale, zero_point = layer.input_quantizer.quantize(x)
    sizes = {"strides": layer.stride, "dilations": layer.dilation, "group": layer.groups}
    sums = _onnx("ConvInteger", (x, codes, zero_point), torch.int32, shape, sizes)
    result = sums.float() * (scale * layer.weight_scale).reshape(-1, *(1,) * dims)
    return result if layer.recorded_bias is None else result + layer.recorded_bias.reshape(-1, *(1,) * dims)


def _embedding(layer: Any, ids: Tensor) -> Tensor:
    return F.embedding(ids, _codes(layer)).float() * layer.weight_scale[ids].unsqueeze(-1)


_FORWARDS = {"linear": _linear, "convolution": _convolution, "embedding": _embedding}


def _onnx(
    name: str,
    inputs: Sequence[Tensor],
    dtype: torch.dtype,
    shape: Sequence[Any],
    attributes: dict[str, Any] | None = None,
) -> Tensor:
    return torch.onnx.ops.symbolic(name, inputs, attributes, dtype=dtype, shape=shape, version=OPSET)
