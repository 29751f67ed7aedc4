"""Granularity of clips: which elements of an operand share one, by name and as dimensions."""

from enum import StrEnum

from ..functional.rows import Dim

ATTENTION_OPERANDS = ("query", "key", "probabilities", "value")


class Granularity(StrEnum):
    """What one clip is for; the names of compressed-tensors' quantization strategies."""

    TENSOR = "tensor"
    ATTN_HEAD = "attn_head"
    TOKEN = "token"
    CHANNEL = "channel"
    GROUP = "group"


GROUP_SIZES = (32, 64, 128)
"""Of groups: what integer hardware multiplies before it scales."""

WEIGHT_GRANULARITIES = (Granularity.CHANNEL, Granularity.TENSOR, Granularity.GROUP)
"""What one clip of a weight can be for: an output feature or channel (the row of its matrix), the whole weight, or a
group of neighbours in a row."""

ACTIVATION_GRANULARITIES: dict[str, tuple[Granularity, ...]] = {
    "input": (Granularity.TENSOR, Granularity.TOKEN, Granularity.GROUP),
    "query": (Granularity.TENSOR, Granularity.ATTN_HEAD, Granularity.TOKEN, Granularity.GROUP),
    "key": (Granularity.TENSOR, Granularity.ATTN_HEAD, Granularity.TOKEN, Granularity.GROUP),
    "probabilities": (Granularity.TENSOR, Granularity.ATTN_HEAD, Granularity.TOKEN, Granularity.GROUP),
    "value": (Granularity.TENSOR, Granularity.ATTN_HEAD, Granularity.CHANNEL, Granularity.GROUP),
}
"""Operand -> what one clip of it can be for, coarsest first.

Those for which the scale factors out of the matmul, so that an integer matmul followed by scaling gives the same
result: elements that differ only in a contracted dimension must share a clip. Groups cut that dimension: the scale
factors out of the product of each group, and these are added in floating point.
"""

FINEST = {
    operand: str([name for name in granularities if name != Granularity.GROUP][-1])
    for operand, granularities in ACTIVATION_GRANULARITIES.items()
}
"""For each operand, the most clips that one integer matmul allows."""

_CHANNELS = "channels are summed over in the product with the {other}, so the scale of one does not factor out"
_TOKENS = "tokens are summed over in the product with the {other}, so the scale of one does not factor out"
_REASONS = {
    ("input", "channel"): _CHANNELS.format(other="weight"),
    ("input", "attn_head"): "the heads of its channels, if any, are summed over in the product with the weight, so the "
    "scale of one does not factor out",
    ("query", "channel"): _CHANNELS.format(other="key"),
    ("key", "channel"): _CHANNELS.format(other="query"),
    ("probabilities", "channel"): "their last dimension is the tokens of the value; " + _TOKENS.format(other="value"),
    ("value", "token"): _TOKENS.format(other="probabilities"),
}

# The dimensions that share a clip, of an operand laid out as [batch, heads, free, contracted], where the free dimension
# is the tokens, or the channels of a value; of a layer's input laid out as [..., contracted].
_SHARED: dict[str, tuple[int, ...] | None] = {
    Granularity.TENSOR: None,
    Granularity.ATTN_HEAD: (-2, -1),
    Granularity.TOKEN: (-1,),
    Granularity.CHANNEL: (-1,),
    Granularity.GROUP: (-1,),
}


def unsupported_reason(operand: str, granularity: str) -> str:
    """Why ``operand`` cannot have clips of this granularity; empty if it is not the name of one that is known."""
    return _REASONS.get((operand, granularity), "")


def shared_dims(granularity: str) -> tuple[int, ...] | None:
    """The dimensions of an activation that share a clip."""
    return _SHARED[granularity]


def frozen_dims(operand: str, granularity: str) -> tuple[int, ...] | None:
    """The dimensions that share a frozen clip.

    All of them where a clip is for tokens, or for groups of them, which have no identity across batches. Groups of a
    linear layer's channels have one, and so have the channels of a value.
    """
    if granularity == Granularity.GROUP:
        granularity = Granularity.CHANNEL if operand == "value" else Granularity.TOKEN
    return None if granularity == Granularity.TOKEN else _SHARED[granularity]


def granularity_of(operand: str, dim: Dim, group_size: int | None) -> str:
    """The name of the granularity whose clips are shared over ``dim``, or over groups of this size."""
    if group_size is not None:
        return str(Granularity.GROUP)
    names = ACTIVATION_GRANULARITIES.get(operand)
    if names is None:
        return str(Granularity.TENSOR if dim is None else Granularity.CHANNEL)
    return next(str(name) for name in names if _SHARED[name] == dim)


def granularity_in_words(granularity: str, group_size: int | None) -> str:
    """What one clip is for, with the size of groups."""
    return f"group of {group_size}" if granularity == Granularity.GROUP else str(granularity)
