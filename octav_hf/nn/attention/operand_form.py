"""Operands of matmuls in one layout, so that the dimensions that share a clip are the same for all."""

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from .match_matmul import OperandDims


def quantize_operand(quantizer: Callable[[Tensor], Tensor], x: Tensor, dims: OperandDims) -> Tensor:
    """``quantizer(x)``, computed on ``[batch dimensions, free, contracted]`` where it has a clip for parts of ``x``.

    Several dimensions of a kind are flattened into one; a missing kind becomes a dimension of size 1.

    Args:
        quantizer: a ``FakeQuantize``, or another callable with ``active_dim``; any other function is called on ``x``.
        x: an operand of a matmul.
        dims: its dimensions by their part in the matmul.

    Returns:
        Shape of ``x``.
    """
    if not is_granular(quantizer):
        return quantizer(x)
    free, contracted = ([dim % x.dim() for dim in part] for part in dims)
    batch = [dim for dim in range(x.dim()) if dim not in (*free, *contracted)]
    order = [*batch, *free, *contracted]
    permuted = x.permute(order)
    flat = [*(x.shape[dim] for dim in batch), *(math.prod(x.shape[dim] for dim in part) for part in (free, contracted))]
    quantized = quantizer(permuted.reshape(flat))
    return quantized.reshape(permuted.shape).permute(sorted(range(x.dim()), key=order.__getitem__))


def is_granular(quantizer: Any) -> bool:
    """Whether the next call of ``quantizer`` has a clip for each of several parts of its tensor."""
    return getattr(quantizer, "active_dim", None) is not None
