"""A common layout for the operands of all matmul functions, so that granular quantizers know the dimensions."""

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..codes import Codes
from .match_matmul import OperandDims


def quantize_operand(quantizer: Callable[..., Any], x: Tensor, dims: OperandDims, **codes: Any) -> Any:
    """``quantizer(x, **codes)`` in the shape of ``x``; a granular quantizer gets ``[batch dims, free, contracted]``.

    The free dimensions are flattened into one, and so are the contracted ones; size 1 if there are none.
    """
    if not is_granular(quantizer):
        return quantizer(x, **codes)
    free, contracted = ([dim % x.dim() for dim in part] for part in dims)
    batch = [dim for dim in range(x.dim()) if dim not in (*free, *contracted)]
    order = [*batch, *free, *contracted]
    permuted = x.permute(order)
    parts = [[x.shape[dim] for dim in part] for part in (free, contracted)]
    flat = [*permuted.shape[: len(batch)], *map(math.prod, parts)]

    def unflatten(y: Tensor) -> Tensor:
        """Undo the layout for ``y``, whose shape is ``flat`` or broadcasts to it."""
        y = y[(None,) * (len(flat) - y.dim())]
        sizes = [part if size > 1 else [1] * len(part) for size, part in zip(y.shape[-2:], parts, strict=True)]
        return y.reshape([*y.shape[:-2], *sizes[0], *sizes[1]]).permute(sorted(range(x.dim()), key=order.__getitem__))

    quantized = quantizer(permuted.reshape(flat), **codes)
    return quantized.map(unflatten) if isinstance(quantized, Codes) else unflatten(quantized)


def is_granular(quantizer: Any) -> bool:
    """Whether the next call of ``quantizer`` has more than one clip per tensor."""
    return getattr(quantizer, "is_granular", False)
