"""Granularity of activation clips: which elements of an operand may share one, by name and as dimensions."""

from ..functional.rows import Dim

ATTENTION_OPERANDS = ("query", "key", "probabilities", "value")

GRANULARITIES: dict[str, tuple[str, ...]] = {
    "input": ("tensor", "token"),
    "query": ("tensor", "head", "token"),
    "key": ("tensor", "head", "token"),
    "probabilities": ("tensor", "head", "token"),
    "value": ("tensor", "head", "channel"),
}
"""Operand -> what a clip of it can be for.

Those for which the scale factors out of the product, so that a product of integers, scaled afterwards, gives the same:
a clip may be of its own for each element of every dimension that the product does not sum over, and for no other.
"""

FINEST = {operand: names[-1] for operand, names in GRANULARITIES.items()}
"""Of each operand, as many clips as its product allows."""

_CHANNELS = "channels are summed over in the product with the {other}, so the scale of one does not factor out"
_TOKENS = "tokens are summed over in the product with the {other}, so the scale of one does not factor out"
_REASONS = {
    ("input", "channel"): _CHANNELS.format(other="weight"),
    ("input", "head"): "the heads of its channels, if any, are summed over in the product with the weight, so the "
    "scale of one does not factor out",
    ("query", "channel"): _CHANNELS.format(other="key"),
    ("key", "channel"): _CHANNELS.format(other="query"),
    ("probabilities", "channel"): "their last dimension is the tokens of the value; " + _TOKENS.format(other="value"),
    ("value", "token"): _TOKENS.format(other="probabilities"),
}

# Dimensions that share a clip, of an operand in the form [batch, heads, own, summed]: own is its tokens, or the
# channels of a value, and summed what its product sums over. Of a layer's input it is [..., summed].
_SHARED: dict[str, tuple[int, ...] | None] = {"tensor": None, "head": (-2, -1), "token": (-1,), "channel": (-1,)}


def refusal(operand: str, granularity: str) -> str:
    """Why ``operand``, of ``GRANULARITIES``, cannot have clips of this granularity; empty if nothing is known of it."""
    return _REASONS.get((operand, granularity), "")


def shared_dims(granularity: str) -> Dim:
    """The dimensions that share a clip."""
    return _SHARED[granularity]


def frozen_dims(granularity: str) -> tuple[int, ...] | None:
    """The dimensions that share a frozen clip: all, for tokens come and go, so that none has a clip of its own."""
    return None if granularity == "token" else _SHARED[granularity]


def granularity_of(operand: str, dim: Dim) -> str:
    """The name of the granularity that ``shared_dims`` gives ``dim`` for, or that of a weight's clips."""
    if operand not in GRANULARITIES:
        return "tensor" if dim is None else "row"
    return next(name for name in GRANULARITIES[operand] if _SHARED[name] == dim)
