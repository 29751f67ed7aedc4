"""Granularity of clips: which elements of an operand share a clip, as a name and as dimensions."""

from enum import StrEnum

from ..functional.rows import Dim

ATTENTION_OPERANDS = ("query", "key", "probabilities", "value")


class Granularity(StrEnum):
    """The part of an operand that shares a clip; names as in the quantization strategies of compressed-tensors."""

    TENSOR = "tensor"
    ATTN_HEAD = "attn_head"
    TOKEN = "token"
    CHANNEL = "channel"
    GROUP = "group"


GROUP_SIZES = (32, 64, 128)
"""Supported group sizes, over which integer hardware accumulates before it scales."""

WEIGHT_GRANULARITIES = (Granularity.CHANNEL, Granularity.TENSOR, Granularity.GROUP)
"""Granularities of weights: per output feature or channel (a row of the matrix), per tensor, or per group in a row."""

ACTIVATION_GRANULARITIES: dict[str, tuple[Granularity, ...]] = {
    "input": (Granularity.TENSOR, Granularity.TOKEN, Granularity.GROUP),
    "query": (Granularity.TENSOR, Granularity.ATTN_HEAD, Granularity.TOKEN, Granularity.GROUP),
    "key": (Granularity.TENSOR, Granularity.ATTN_HEAD, Granularity.TOKEN, Granularity.GROUP),
    "probabilities": (Granularity.TENSOR, Granularity.ATTN_HEAD, Granularity.TOKEN, Granularity.GROUP),
    "value": (Granularity.TENSOR, Granularity.ATTN_HEAD, Granularity.CHANNEL, Granularity.GROUP),
}
"""Operand -> supported granularities, coarsest first.

The scale must factor out of the matmul, so that an integer matmul followed by scaling gives the same result. Elements
that differ only in a contracted dimension must therefore share a clip. Groups split the contracted dimension: the scale
factors out of the product of each group, and these products are added in floating point.
"""

FINEST = {
    operand: str([name for name in granularities if name != Granularity.GROUP][-1])
    for operand, granularities in ACTIVATION_GRANULARITIES.items()
}
"""For each operand, the finest granularity that one integer matmul allows."""

_CHANNELS = "the matmul with the {other} sums over channels, so the scale of a channel does not factor out"
_TOKENS = "the matmul with the {other} sums over tokens, so the scale of a token does not factor out"
_REASONS = {
    ("input", "channel"): _CHANNELS.format(other="weight"),
    ("input", "attn_head"): "the matmul with the weight sums over all channels, including those of different heads, so "
    "the scale of a head does not factor out",
    ("query", "channel"): _CHANNELS.format(other="key"),
    ("key", "channel"): _CHANNELS.format(other="query"),
    ("probabilities", "channel"): "their last dimension is the tokens of the value, and "
    + _TOKENS.format(other="value"),
    ("value", "token"): _TOKENS.format(other="probabilities"),
}

# The dimensions that share a clip. Operands of attention are laid out as [batch, heads, free, contracted], where the
# free dimension is the tokens, or for a value the channels; a layer's input as [..., contracted].
_SHARED: dict[str, tuple[int, ...] | None] = {
    Granularity.TENSOR: None,
    Granularity.ATTN_HEAD: (-2, -1),
    Granularity.TOKEN: (-1,),
    Granularity.CHANNEL: (-1,),
    Granularity.GROUP: (-1,),
}


def unsupported_reason(operand: str, granularity: str) -> str:
    """Why ``operand`` cannot have clips of this granularity; empty if no reason is known."""
    return _REASONS.get((operand, granularity), "")


def shared_dims(granularity: str) -> tuple[int, ...] | None:
    """The dimensions of an activation that share a clip."""
    return _SHARED[granularity]


def frozen_dims(operand: str, granularity: str) -> tuple[int, ...] | None:
    """The dimensions that share a frozen clip.

    All of them for clips per token, because tokens have no identity across batches. Channels of a value, and groups of
    channels, have an identity and keep their own clips.
    """
    if granularity == Granularity.GROUP:
        granularity = Granularity.CHANNEL if operand == "value" else Granularity.TOKEN
    return None if granularity == Granularity.TOKEN else _SHARED[granularity]


def granularity_of(operand: str, dim: Dim, group_size: int | None) -> str:
    """The name of the granularity with this ``dim`` and group size."""
    if group_size is not None:
        return str(Granularity.GROUP)
    names = ACTIVATION_GRANULARITIES.get(operand)
    if names is None:
        return str(Granularity.TENSOR if dim is None else Granularity.CHANNEL)
    return next(str(name) for name in names if _SHARED[name] == dim)


def granularity_in_words(granularity: str, group_size: int | None) -> str:
    """The granularity for reports, with the size of groups."""
    return f"group of {group_size}" if granularity == Granularity.GROUP else str(granularity)
