"""Operands of products in one form, so that the dimensions that share a clip are the same for all."""

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from .products import OperandDims


def quantize_operand(quantizer: Callable[[Tensor], Tensor], x: Tensor, dims: OperandDims) -> Tensor:
    """``quantizer(x)``, made from ``[batch dimensions, own, summed]`` where it has a clip for parts of it.

    Several dimensions of a kind are flattened into one; one that there is none of has size 1.

    Args:
        quantizer: a ``FakeQuantize``, or something that says its ``dim_now``; any other function is called on ``x``.
        x: an operand of a product.
        dims: its dimensions by their part in the product.

    Returns:
        Shape of ``x``.
    """
    if not has_parts(quantizer):
        return quantizer(x)
    own, summed = ([dim % x.dim() for dim in part] for part in dims)
    batch = [dim for dim in range(x.dim()) if dim not in (*own, *summed)]
    order = [*batch, *own, *summed]
    permuted = x.permute(order)
    flat = [*(x.shape[dim] for dim in batch), *(math.prod(x.shape[dim] for dim in part) for part in (own, summed))]
    quantized = quantizer(permuted.reshape(flat))
    return quantized.reshape(permuted.shape).permute(sorted(range(x.dim()), key=order.__getitem__))


def has_parts(quantizer: Any) -> bool:
    """Whether the next call of ``quantizer`` has a clip for each of several parts of its tensor."""
    return getattr(quantizer, "dim_now", None) is not None
