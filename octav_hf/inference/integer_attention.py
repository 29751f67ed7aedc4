"""Attention with integer matmuls."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..functional.kernels import attention as kernel
from ..nn import ATTENTION_OPERANDS
from ..nn.attention.arithmetic import AttentionArithmetic
from ..nn.attention.match_matmul import COLUMNS, ROWS, Matmul, OperandDims
from ..nn.attention.operand_form import quantize_operand
from ..nn.attention.scaled_dot_product_attention import additive_mask, attention_probabilities, quantize_for_heads
from ..nn.codes import Codes
from .integer_matmul import multiply

_DIMS = ROWS, COLUMNS  # of the operands of torch.matmul
_CODES = {"codes": torch.float32}


class IntegerAttentionArithmetic(AttentionArithmetic):
    """Multiplies the integers of the operands and scales the sums.

    Elements along a contracted dimension share a scale, so the scale of an element of the result is the scale of its
    row in the left operand times the scale of its column in the right operand.

    Args:
        reference: compute the matmuls in float64.
    """

    def __init__(self, reference: bool):
        self.reference = reference

    def __str__(self) -> str:
        """How the matmuls are computed, for the coverage report."""
        return f"integers as float{64 if self.reference else 32}"

    def matmul(self, quantizers: Sequence[Callable[..., Any]], matmul: Matmul) -> Any:
        left, right = (
            quantize_operand(quantizer, x, dims, **_CODES)
            for quantizer, x, dims in zip(quantizers, matmul.operands, matmul.dims, strict=True)
        )
        result = self._multiply(matmul.product, left, right, matmul.dims)
        return matmul.finish(result.to(matmul.operands[0].dtype))

    def scaled_dot_product_attention(
        self,
        quantizers: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        heads = query.shape[-3] if enable_gqa else None
        dtype = query.dtype
        is_fused = not self.reference and not dropout_p and _is_fused(quantizers, query)
        codes = {"codes": torch.uint8} if is_fused else _CODES
        queries = quantize_operand(quantizers["query"], query, ROWS, **codes)
        keys = quantize_for_heads(quantizers["key"], key, heads, ROWS, **codes)
        values = quantize_for_heads(quantizers["value"], value, heads, COLUMNS, **codes)
        if is_fused:
            like = query.new_empty(()).expand(query.shape[-2], key.shape[-2])
            mask = additive_mask(attn_mask, is_causal, like)
            return _fused_attention(queries, keys, values, quantizers["probabilities"], mask, scale)
        scores = self._multiply(_times_transposed, queries, keys, (ROWS, ROWS), scale)
        probabilities = attention_probabilities(scores.to(dtype), attn_mask, is_causal, dropout_p, dtype)
        quantized = quantize_operand(quantizers["probabilities"], probabilities, ROWS, **_CODES)
        return self._multiply(torch.matmul, quantized, values, _DIMS).to(dtype)

    def _multiply(
        self,
        product: Callable[[Tensor, Tensor], Tensor],
        left: Codes,
        right: Codes,
        dims: tuple[OperandDims, OperandDims],
        factor: float = 1.0,
    ) -> Tensor:
        """``factor`` times the product of the dequantized operands."""
        terms = math.prod([left.integers.shape[dim] for dim in dims[0].contracted])
        sums = multiply(product, left, right, terms, self.reference)
        if left.is_granular or right.is_granular:
            scale = product(_scale_of(left, dims[0]), _scale_of(right, dims[1]))
        else:
            scale = left.scale.reshape(()) * right.scale.reshape(())
        # Converted explicitly, because a 0-dim scale does not promote. Usually this makes no copy.
        return sums.to(torch.promote_types(sums.dtype, scale.dtype)).mul_(scale * factor)


def _is_fused(quantizers: Any, query: Tensor) -> bool:
    """Whether ``kernels.attention`` can be used: one clip per operand, frozen for the probabilities."""
    modules = {name: quantizers[name].quantizer for name in ATTENTION_OPERANDS}
    return (
        query.dim() == 4
        and modules["probabilities"].is_static
        and modules["probabilities"].signed is False
        and all(modules[name].signed and not modules[name].is_granular for name in ("query", "key", "value"))
        and kernel.is_supported(query)
    )


def _fused_attention(
    query: Codes, key: Codes, value: Codes, probabilities: Any, mask: Tensor | None, scale: float
) -> Tensor:
    quantizer = probabilities.quantizer
    step = float(quantizer.frozen.clips[probabilities.next_index()]) / 2**quantizer.num_bits
    scales = float(query.scale) * float(key.scale) * scale, step * float(value.scale)
    codes = query.integers.contiguous(), key.integers.contiguous(), value.integers.contiguous()
    lowest = query.lowest, key.lowest, value.lowest
    return kernel.attention(*codes, lowest, mask, scales, step, quantizer.num_bits)


def _times_transposed(left: Tensor, right: Tensor) -> Tensor:
    return torch.matmul(left, right.transpose(-2, -1))


def _scale_of(codes: Codes, dims: OperandDims) -> Tensor:
    """The scales with the operand's dimensions: size 1 along contracted ones, expanded along batch dimensions."""
    shape = codes.integers.shape
    scale = codes.scale[(None,) * (len(shape) - codes.scale.dim())]
    own = [dim % len(shape) for part in dims for dim in part]
    return scale.expand([scale.shape[dim] if dim in own else size for dim, size in enumerate(shape)])
