"""Quantized layers that ``torch.onnx.export`` records as ONNX operators for integers."""

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..nn import FakeQuantize, PackedLayer, PackedWeight, QuantizedAttention, QuantizedLayer
from .recorded_operands import RecordedAttention, RecordedQuantizer, dequantized, onnx, zero_point

INT4, INT8 = "int4_weight", "int8_weight"
"""Names of the buffers (and initializers) with a weight's integers, by the type in which they are stored."""


def record_modules(model: nn.Module) -> None:
    """Make the forward of every quantized module of ``model`` record ONNX operators; in place, cannot be undone."""
    for module in model.modules():
        if isinstance(module, QuantizedLayer):
            _record_layer(module)
        elif isinstance(module, QuantizedAttention):
            module.arithmetic = RecordedAttention(reference=False)
            for quantizer in module.operand_quantizers.values():
                assert isinstance(quantizer, FakeQuantize)
                # ONNX Runtime does not convert int8 codes that two matmuls share, as in DeBERTa. Other codes have no
                # zero point, because OpenVINO would leave the attention matmul in float.
                is_shared = quantizer.frozen is not None and len(quantizer.frozen.clips) > 1
                RecordedQuantizer.record(quantizer, counts_from_lowest=is_shared)


def _record_layer(layer: Any) -> None:
    quantizer, inputs = layer.weight_quantizer, layer.operand_quantizers.get("input")
    if isinstance(inputs, FakeQuantize):
        RecordedQuantizer.record(inputs, counts_from_lowest=True)  # layers such as query and key share codes
    if not isinstance(quantizer, FakeQuantize):
        return  # the matmul is in float
    packed = quantizer if isinstance(quantizer, PackedWeight) else PackedWeight.pack(quantizer, layer.weight)
    if isinstance(layer, PackedLayer):
        layer.unpack()  # a model may read the weight's dtype, which would record a dequantization
    if isinstance(inputs, nn.Identity):
        # The matmul is in float too. If the weight were stored as integers, ONNX Runtime would quantize the input.
        layer.weight = nn.Parameter(packed.dequantize(), requires_grad=False)
        layer.restore()
        return
    if layer.kind not in _FORWARDS:
        raise NotImplementedError(
            f"{packed.name}: {layer.float_class.__name__} cannot be exported to ONNX; add it to exclude_modules"
        )
    integers = packed.integers()
    if layer.kind == "linear" and isinstance(layer, nn.Linear):
        integers = integers.t().contiguous()  # [in, out], as in Transformers' Conv1D
    layer.register_buffer(INT4 if packed.num_bits <= 4 else INT8, integers)
    layer.register_buffer("weight_scale", packed.scale.float() if len(packed.scale) > 1 else packed.scale.float()[0])
    if isinstance(inputs, RecordedQuantizer) and inputs.start:
        # The offset adds the same vector to each row of the result.
        sums = inputs.start * packed.scale.double() * integers.sum(0, dtype=torch.float64)
        layer.bias = nn.Parameter((sums if layer.bias is None else sums + layer.bias).float(), requires_grad=False)
    layer.forward = functools.partial(_FORWARDS[layer.kind], layer)


def _linear(layer: Any, x: Tensor) -> Tensor:
    """``nn.Linear.forward``, also for Transformers' ``Conv1D``."""
    is_matrix = x.dim() == 2  # ONNX Runtime would fuse a 2-dim matmul and the bias into a float operator
    x = dequantized(layer.input_quantizer(x.unsqueeze(0) if is_matrix else x, codes=torch.uint8))
    integers = _integers(layer)
    attributes = {"axis": 1} if layer.weight_scale.dim() else {}
    weight = onnx("DequantizeLinear", (integers, layer.weight_scale), torch.float32, integers.shape, attributes)
    # Not torch.matmul, which an enclosing attention module would take for an attention matmul.
    result = onnx("MatMul", (x, weight), torch.float32, (*x.shape[:-1], integers.shape[1]))
    result = result.squeeze(0) if is_matrix else result
    if layer.bias is None:
        return result
    # It also fuses matmuls with a static shape, unless the bias has more than one dimension.
    is_static = all(isinstance(size, int) for size in x.shape)
    return result + (layer.bias[(None,) * (result.dim() - 1)] if is_static else layer.bias)


def _convolution(layer: Any, x: Tensor) -> Tensor:
    """``nn.Conv1d.forward`` and ``nn.Conv2d.forward`` as ConvInteger; with DequantizeLinear they would run in float."""
    integers = _integers(layer)
    shape = layer._conv_forward(x, integers.float(), None).shape
    padding = layer._reversed_padding_repeated_twice  # last dimension first; before and after
    if layer.padding_mode != "zeros":
        x, padding = F.pad(x, padding, layer.padding_mode), [0] * len(padding)
    codes = layer.input_quantizer(x, codes=torch.uint8)
    sizes = {
        "strides": layer.stride,
        "dilations": layer.dilation,
        "group": layer.groups,
        "pads": [*padding[-2::-2], *padding[::-2]],
    }
    sums = onnx("ConvInteger", (codes.integers, integers, zero_point(codes)), torch.int32, shape, sizes)
    channels = (-1, *(1,) * (len(shape) - 2))
    result = sums.float() * (codes.scale * layer.weight_scale).reshape(channels)
    return result if layer.bias is None else result + layer.bias.reshape(channels)


def _embedding(layer: Any, ids: Tensor) -> Tensor:
    """``nn.Embedding.forward``."""
    return F.embedding(ids, _integers(layer)).float() * layer.weight_scale[ids].unsqueeze(-1)


def _integers(layer: Any) -> Tensor:
    return layer.get_buffer(INT4 if hasattr(layer, INT4) else INT8)


_FORWARDS = {"linear": _linear, "convolution": _convolution, "embedding": _embedding}
