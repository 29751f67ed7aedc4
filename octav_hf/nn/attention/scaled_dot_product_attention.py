"""Scaled dot-product attention whose matmuls have quantized operands."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..codes import Codes
from .match_matmul import COLUMNS, ROWS, OperandDims
from .operand_form import is_granular, quantize_operand

OperandQuantizers = Mapping[str, nn.Module] | nn.ModuleDict
"""The modules named ``query``, ``key``, ``probabilities`` and ``value``."""

Quantize = Callable[..., Any]


def quantized_scaled_dot_product_attention(
    quantizers: Mapping[str, Quantize] | nn.ModuleDict,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """``torch.nn.functional.scaled_dot_product_attention`` with quantized query, key, probabilities and value.

    Args:
        quantizers: functions or modules named ``query``, ``key``, ``probabilities`` and ``value``. Probabilities are
            quantized after dropout, as the operand of the second matmul. Granular quantizers get the contracted
            dimension last, for example the value as ``[..., heads, V, S]``.
        query: ``[..., heads, L, E]``.
        key: ``[..., key heads, S, E]``.
        value: ``[..., key heads, S, V]``.
        attn_mask: broadcastable to ``[..., heads, L, S]``; boolean (True: attend) or added to the scores.
        dropout_p, is_causal, scale, enable_gqa: as in torch.

    Returns:
        ``[..., heads, L, V]``; zero for a query whose keys are all masked, as in torch.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    heads = query.shape[-3] if enable_gqa else None
    query = quantize_operand(quantizers["query"], query, ROWS)
    key = quantize_for_heads(quantizers["key"], key, heads, ROWS)
    value = quantize_for_heads(quantizers["value"], value, heads, COLUMNS)
    # Scaling the query is cheaper than scaling the scores.
    scores = torch.matmul(query * scale, key.transpose(-2, -1))
    probabilities = attention_probabilities(scores, attn_mask, is_causal, dropout_p, value.dtype)
    return torch.matmul(quantize_operand(quantizers["probabilities"], probabilities, ROWS), value)


def attention_probabilities(
    scores: Tensor, attn_mask: Tensor | None, is_causal: bool, dropout_p: float, dtype: torch.dtype
) -> Tensor:
    """The left operand of the second matmul, in ``dtype``; the mask may be added to ``scores`` in place."""
    mask = additive_mask(attn_mask, is_causal, scores)
    probabilities = _softmax(scores) if mask is None else _masked_softmax(scores, mask)
    return nn.functional.dropout(probabilities.to(dtype), dropout_p)


def _softmax(scores: Tensor) -> Tensor:
    return torch.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32))


def _masked_softmax(scores: Tensor, mask: Tensor) -> Tensor:
    """The softmax of ``scores + mask``, with zeros in rows that are fully masked, where it would be NaN.

    In eager mode, the mask of such a row is removed for its first key, so that the softmax is a 1 followed by zeros,
    and the 1 is then overwritten. This needs neither a read on the host nor another tensor of this size.
    """
    if torch.compiler.is_compiling():
        return _fused_masked_softmax(scores, mask)
    blind = (mask == -torch.inf).all(dim=-1, keepdim=True)
    first = torch.arange(scores.shape[-1], device=scores.device, dtype=torch.int64) == 0
    probabilities = _softmax(scores.add_(mask.masked_fill(blind & first, 0)))
    # .data hides the write from autograd, which has saved this tensor. Both rows have the gradient zero.
    if scores.shape[-1]:
        probabilities.data.narrow(-1, 0, 1).masked_fill_(blind, 0)
    return probabilities


def _fused_masked_softmax(scores: Tensor, mask: Tensor) -> Tensor:
    """``_masked_softmax`` in a form that a compiler fuses like a plain softmax.

    Fully masked rows are recognized by their highest score, which the softmax needs anyway; a flag computed from the
    mask would prevent the fusion of division and sum. Masked positions get no gradient, not even the NaN of these rows.
    """
    scores = torch.where(mask == -torch.inf, -torch.inf, scores + mask)
    highest = scores.detach().amax(dim=-1, keepdim=True)
    return _softmax(scores).masked_fill(highest == -torch.inf, 0)


def quantize_for_heads(quantizer: Quantize, x: Tensor, heads: int | None, dims: OperandDims, **codes: Any) -> Any:
    """Quantize ``x``, and repeat its heads up to ``heads`` unless that is ``None``."""
    if heads is None:
        return quantize_operand(quantizer, x, dims, **codes)
    repeats = heads // x.shape[-3]
    # Clips per head are those of repeated heads, because Transformers' models repeat heads first if there is a mask.
    if is_granular(quantizer):
        return quantize_operand(quantizer, x.repeat_interleave(repeats, dim=-3), dims, **codes)
    quantized = quantizer(x, **codes)
    if isinstance(quantized, Codes):
        return quantized._replace(integers=quantized.integers.repeat_interleave(repeats, dim=-3))
    return quantized.repeat_interleave(repeats, dim=-3)


def additive_mask(attn_mask: Tensor | None, is_causal: bool, like: Tensor) -> Tensor | None:
    """The mask to add to the scores ``like``, with -inf at masked positions."""
    if is_causal:
        if attn_mask is not None:
            raise ValueError("scaled_dot_product_attention: pass either attn_mask or is_causal=True, not both")
        attn_mask = torch.ones(like.shape[-2:], dtype=torch.bool, device=like.device).tril()
    if attn_mask is None or attn_mask.dtype != torch.bool:
        return attn_mask
    return torch.zeros_like(attn_mask, dtype=like.dtype).masked_fill(~attn_mask, -torch.inf)
