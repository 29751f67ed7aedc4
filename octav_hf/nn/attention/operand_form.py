"""One layout for operands of all matmul functions, in which quantizers count dimensions."""

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from .match_matmul import OperandDims


def quantize_operand(quantizer: Callable[[Tensor], Tensor], x: Tensor, dims: OperandDims) -> Tensor:
    """``quantizer(x)``, shape of ``x``; a granular quantizer is called on ``[batch dimensions, free, contracted]``.

    The free and contracted dimensions are flattened into one each, of size 1 if there is none.
    """
    if not is_granular(quantizer):
        return quantizer(x)
    free, contracted = ([dim % x.dim() for dim in part] for part in dims)
    batch = [dim for dim in range(x.dim()) if dim not in (*free, *contracted)]
    order = [*batch, *free, *contracted]
    permuted = x.permute(order)
    flat = [
        *(x.shape[dim] for dim in batch),
        *(math.prod([x.shape[dim] for dim in part]) for part in (free, contracted)),
    ]
    quantized = quantizer(permuted.reshape(flat))
    return quantized.reshape(permuted.shape).permute(sorted(range(x.dim()), key=order.__getitem__))


def is_granular(quantizer: Any) -> bool:
    """Whether ``quantizer`` has separate clips for parts of a tensor at its next call."""
    return getattr(quantizer, "active_dim", None) is not None
