"""A plain float64 BertForQuestionAnswering with OCTAV quantization, written as functions over a state_dict.

The judge of `apply_octav` on a whole model: no transformers modelling code and no octav_hf, only torch's elementary
operations and the references of `tests.twins`. What is quantized follows Appendix E.2 of the paper: every linear
layer's weight (one clip per row) and input (one per tensor), and both operands of both attention matmuls (one per
tensor; probabilities on the unsigned grid); or with a granularity one for each part of an activation. Embeddings and
LayerNorm stay float. Backward: section 4's estimators.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from tests.twins import as_float64, gradient_twin, midpoint_distance_twin, octav_clip_twin, quantize_twin

Tensor = torch.Tensor


@dataclass
class Quantization:
    """The settings of the twin, and statistics of its forward pass.

    weight_bits, activation_bits: None leaves that side in float. weight_gradient_estimator,
    activation_gradient_estimator: "ste", "pwl" or "mad" (the default is the paper's MPH). exclude: names of linear
    layers, or of an attention module for its matmuls' operands, that stay in float. granularity: operand -> "token",
    "attn_head" or "channel", for those that have not one clip per tensor. round_clips: round each clip to float32, as a
    quantizer that keeps float32 clips does.

    After a forward pass: `clips` by operand name; `midpoint_margin`, the smallest distance in steps of any activation
    from a rounding midpoint; `clip_margin`, the smallest relative distance of any activation's magnitude from its clip
    (a clip may also be one of the magnitudes, where Eq. 6 has no fixed point);
    `zero_margin`, the smallest |sum p v| / sum |p v| of the attention's output. A right computation agrees with
    another only where all three are well above their rounding errors. The third, because Eq. 6 leaves exact zeros
    out: operands on a grid cancel often, and whether they leave 0 or 1e-17, so whether the element counts, is a matter
    of the order of summation, which then moves the clip by some 1e-4.
    """

    weight_bits: int | None = 4
    activation_bits: int | None = 4
    weight_gradient_estimator: str = "mad"
    activation_gradient_estimator: str = "pwl"
    exclude: Collection[str] = ()
    granularity: Mapping[str, str] = field(default_factory=dict)
    round_clips: bool = True
    clips: dict[str, np.ndarray] = field(default_factory=dict)
    midpoint_margin: float = math.inf
    clip_margin: float = math.inf
    zero_margin: float = math.inf

    def weight(self, weight: Tensor, layer: str) -> Tensor:
        """The weight [out, in] of `layer` through the signed quantizer, one clip per row."""
        if self.weight_bits is None or layer in self.exclude:
            return weight
        clips = np.array([[octav_clip_twin(row, self.weight_bits)] for row in as_float64(weight)])
        return self._apply(weight, clips, self.weight_bits, True, self.weight_gradient_estimator, f"{layer}.weight")

    def activation(self, x: Tensor, module: str, operand: str, signed: bool = True) -> Tensor:
        """An activation, [batch, heads, tokens, channels] or [batch, tokens, channels], through the quantizer."""
        if self.activation_bits is None or module in self.exclude:
            return x
        # Which axes share a clip: a token has all its channels for itself, a channel all its tokens, a head both.
        axes = {"token": (-1,), "channel": (-2,), "attn_head": (-2, -1)}.get(self.granularity.get(operand, "tensor"))
        clip = clips_of_parts(x, self.activation_bits, signed, axes)
        quantized = self._apply(
            x, clip, self.activation_bits, signed, self.activation_gradient_estimator, f"{module}.{operand}"
        )
        values, s = as_float64(x), self.clips[f"{module}.{operand}"]
        distances = midpoint_distance_twin(values, s, self.activation_bits, signed)
        self.midpoint_margin = min(self.midpoint_margin, float(distances[values != 0].min()))
        distances = np.abs(np.abs(values) / s - 1)
        self.clip_margin = min(self.clip_margin, float(distances[distances > 0].min()))
        return quantized

    def _apply(self, x: Tensor, clip: np.ndarray, bits: int, signed: bool, gradient: str, name: str) -> Tensor:
        if self.round_clips:
            clip = clip.astype(np.float32).astype(np.float64)
        self.clips[name] = clip
        quantized = torch.from_numpy(quantize_twin(x, clip, bits, signed))
        factor = torch.from_numpy(gradient_twin(x, clip, signed, gradient))
        return _Quantized.apply(x, quantized, factor)


def clips_of_parts(x: Any, num_bits: int, signed: bool, axes: tuple[int, ...] | None) -> np.ndarray:
    """OCTAV's clip of each part of `x`, one by one; `axes` share one and have size 1 in the result, 0-dim for None."""
    values = as_float64(x)
    if axes is None:
        return np.array(octav_clip_twin(values, num_bits, signed))
    shape = [1 if axis - values.ndim in axes else size for axis, size in enumerate(values.shape)]
    clips = np.empty(shape)
    for part in np.ndindex(*shape):
        index = tuple(slice(None) if axis - values.ndim in axes else i for axis, i in enumerate(part))
        clips[part] = octav_clip_twin(values[index], num_bits, signed)
    return clips


class _Quantized(torch.autograd.Function):
    """Forward: the given quantized values. Backward: the incoming gradient times the given factor dQ/dx."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, quantized: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(factor)
        return quantized.view_as(x).clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (factor,) = ctx.saved_tensors
        return grad * factor, None, None


def linear(x: Tensor, state: Mapping[str, Tensor], layer: str, q: Quantization) -> Tensor:
    """Q(x) Q(W)^T + b."""
    return q.activation(x, layer, "input") @ q.weight(state[f"{layer}.weight"], layer).T + state[f"{layer}.bias"]


def layer_norm(x: Tensor, state: Mapping[str, Tensor], name: str, eps: float) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last dimension, in float."""
    centred = x - x.mean(-1, keepdim=True)
    variance = (centred * centred).mean(-1, keepdim=True)
    return centred / torch.sqrt(variance + eps) * state[f"{name}.weight"] + state[f"{name}.bias"]


def gelu(x: Tensor) -> Tensor:
    """The exact GELU, x Φ(x)."""
    return 0.5 * x * (1.0 + torch.erf(x / math.sqrt(2.0)))


def softmax(x: Tensor) -> Tensor:
    """exp(x) / sum exp(x) over the last dimension."""
    e = torch.exp(x - x.detach().max(-1, keepdim=True).values)
    return e / e.sum(-1, keepdim=True)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[batch, length, hidden] -> [batch, heads, length, hidden / heads]."""
    batch, length, hidden = x.shape
    return x.reshape(batch, length, heads, hidden // heads).permute(0, 2, 1, 3)


def attention(
    x: Tensor, state: Mapping[str, Tensor], name: str, heads: int, attention_mask: Tensor, q: Quantization
) -> Tensor:
    """Multi-head self-attention: softmax(Q(q) Q(k)^T / sqrt(d) + mask), then Q(probabilities) Q(v); dropout 0."""
    query = q.activation(split_heads(linear(x, state, f"{name}.query", q), heads), name, "query")
    key = q.activation(split_heads(linear(x, state, f"{name}.key", q), heads), name, "key")
    value = q.activation(split_heads(linear(x, state, f"{name}.value", q), heads), name, "value")
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    scores = scores.masked_fill(attention_mask[:, None, None, :] == 0, -1e300)
    probabilities = q.activation(softmax(scores), name, "probabilities", signed=False)
    context = probabilities @ value
    terms = (probabilities.abs() @ value.abs()).detach()
    q.zero_margin = min(q.zero_margin, float((context.detach().abs() / terms)[terms > 0].min()))
    return context.permute(0, 2, 1, 3).reshape(x.shape)


def bert_for_question_answering(
    state: Mapping[str, Tensor],
    config: Any,
    input_ids: Tensor,
    attention_mask: Tensor,
    token_type_ids: Tensor,
    quantization: Quantization,
) -> tuple[Tensor, Tensor]:
    """Start and end logits [batch, length] of BertForQuestionAnswering in float64.

    `state` is the model's state_dict as float64 tensors (requiring grad where wanted); `config` gives
    num_hidden_layers, num_attention_heads and layer_norm_eps; `attention_mask` is 1 for a token, 0 for padding.
    """
    q, eps = quantization, config.layer_norm_eps
    e = "bert.embeddings"
    positions = torch.arange(input_ids.shape[1])
    x = (
        state[f"{e}.word_embeddings.weight"][input_ids]
        + state[f"{e}.position_embeddings.weight"][positions]
        + state[f"{e}.token_type_embeddings.weight"][token_type_ids]
    )
    x = layer_norm(x, state, f"{e}.LayerNorm", eps)
    for i in range(config.num_hidden_layers):
        layer = f"bert.encoder.layer.{i}"
        context = attention(x, state, f"{layer}.attention.self", config.num_attention_heads, attention_mask, q)
        attended = linear(context, state, f"{layer}.attention.output.dense", q)
        x = layer_norm(attended + x, state, f"{layer}.attention.output.LayerNorm", eps)
        hidden = gelu(linear(x, state, f"{layer}.intermediate.dense", q))
        x = layer_norm(linear(hidden, state, f"{layer}.output.dense", q) + x, state, f"{layer}.output.LayerNorm", eps)
    logits = linear(x, state, "qa_outputs", q)
    return logits[..., 0], logits[..., 1]


def question_answering_loss(start_logits: Tensor, end_logits: Tensor, starts: Tensor, ends: Tensor) -> Tensor:
    """Mean of the start's and the end's cross-entropy; positions lie inside the sequence."""

    def cross_entropy(logits: Tensor, positions: Tensor) -> Tensor:
        picked = logits.gather(1, positions[:, None])[:, 0]
        return (torch.logsumexp(logits, dim=1) - picked).mean()

    return 0.5 * (cross_entropy(start_logits, starts) + cross_entropy(end_logits, ends))
