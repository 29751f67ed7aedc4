"""Scaled dot-product attention with quantized operands of both matmuls."""

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
            dimension last, so the value as ``[..., heads, V, S]``.
        query: ``[..., heads, L, E]``.
        key: ``[..., key heads, S, E]``.
        value: ``[..., key heads, S, V]``.
        attn_mask: broadcastable to ``[..., heads, L, S]``; boolean (True: attend) or added to the scores.
        dropout_p, is_causal, scale, enable_gqa: as in torch.

    Returns:
        ``[..., heads, L, V]``; zero for a query that may attend to no key, as in torch.
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
    """What the second matmul multiplies, in ``dtype``; the mask may be added to ``scores`` in place."""
    mask = additive_mask(attn_mask, is_causal, scores)  # in place, which is safe for the backward pass
    probabilities = _softmax(scores) if mask is None else _masked_softmax(scores, mask)
    return nn.functional.dropout(probabilities.to(dtype), dropout_p)


def _softmax(scores: Tensor) -> Tensor:
    return torch.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32))


def _masked_softmax(scores: Tensor, mask: Tensor) -> Tensor:
    """The softmax of ``scores + mask``, with a row of zeros where the mask is minus infinity everywhere.

    There the softmax would be NaN. In eager mode such a row may attend to its first key instead, so that it is 1 and
    zeros, and the 1 is erased: without reading the mask's values on the host, and without another tensor of this size.
    """
    if torch.compiler.is_compiling():
        return _fused_masked_softmax(scores, mask)
    blind = (mask == -torch.inf).all(dim=-1, keepdim=True)
    first = torch.arange(scores.shape[-1], device=scores.device, dtype=torch.int64) == 0
    probabilities = _softmax(scores.add_(mask.masked_fill(blind & first, 0)))
    # Hidden from autograd, which keeps this tensor: the gradient of 1 and zeros is zero, and so is that of zeros.
    if scores.shape[-1]:
        probabilities.data.narrow(-1, 0, 1).masked_fill_(blind, 0)
    return probabilities


def _fused_masked_softmax(scores: Tensor, mask: Tensor) -> Tensor:
    """``_masked_softmax`` in the form of which a compiler makes the same loops as of a softmax without such rows.

    Their highest score, which the softmax needs anyway, tells them, where a flag with the shape of the mask would keep
    the division from being fused with the sum. No gradient goes where nothing may be attended to, not even their NaN.
    """
    scores = torch.where(mask == -torch.inf, -torch.inf, scores + mask)
    highest = scores.detach().amax(dim=-1, keepdim=True)
    return _softmax(scores).masked_fill(highest == -torch.inf, 0)


def quantize_for_heads(quantizer: Quantize, x: Tensor, heads: int | None, dims: OperandDims, **codes: Any) -> Any:
    """``x`` quantized, with its heads repeated to ``heads`` unless that is ``None``."""
    if heads is None:
        return quantize_operand(quantizer, x, dims, **codes)
    repeats = heads // x.shape[-3]
    # Per-head clips are for repeated heads, because Transformers' models repeat them first if there is a mask.
    if is_granular(quantizer):
        return quantize_operand(quantizer, x.repeat_interleave(repeats, dim=-3), dims, **codes)
    quantized = quantizer(x, **codes)
    if isinstance(quantized, Codes):
        return quantized._replace(integers=quantized.integers.repeat_interleave(repeats, dim=-3))
    return quantized.repeat_interleave(repeats, dim=-3)


def additive_mask(attn_mask: Tensor | None, is_causal: bool, like: Tensor) -> Tensor | None:
    """The mask to add to ``like``, the scores, with minus infinity where nothing may be attended to."""
    if is_causal:
        if attn_mask is not None:
            raise ValueError("scaled_dot_product_attention: pass either attn_mask or is_causal=True, not both")
        attn_mask = torch.ones(like.shape[-2:], dtype=torch.bool, device=like.device).tril()
    if attn_mask is None or attn_mask.dtype != torch.bool:
        return attn_mask
    return torch.zeros_like(attn_mask, dtype=like.dtype).masked_fill(~attn_mask, -torch.inf)
