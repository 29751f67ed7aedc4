"""Recognize calls of torch functions that are matmuls of two tensors."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..._utils.torch_private import LINEAR

Function = Callable[..., Any]


Place = tuple[int, str]  # position and keyword of an argument

_MATMUL = (0, "input"), (1, "other")
_METHOD = (0, "self"), (1, "other")
_MM = (0, "input"), (1, "mat2")
_ADDMM = (1, "mat1"), (2, "mat2")
_BADDBMM = (1, "batch1"), (2, "batch2")

# Function -> where it takes the left and the right operand.
_PLACES: dict[Function, tuple[Place, Place]] = {
    torch.matmul: _MATMUL,
    torch.linalg.matmul: _MATMUL,
    Tensor.matmul: _METHOD,
    Tensor.__matmul__: _METHOD,
    Tensor.__rmatmul__: (_METHOD[1], _METHOD[0]),
    **dict.fromkeys((torch.mm, Tensor.mm, torch.bmm, Tensor.bmm), _MM),
    **dict.fromkeys((torch.addmm, Tensor.addmm, Tensor.addmm_), _ADDMM),
    **dict.fromkeys((torch.baddbmm, Tensor.baddbmm, Tensor.baddbmm_), _BADDBMM),
    **dict.fromkeys((torch.addbmm, Tensor.addbmm, Tensor.addbmm_), _BADDBMM),
}

# Functions that add a matmul to their first argument -> that matmul.
_ADDING: dict[Function, Function] = {
    **dict.fromkeys((torch.addmm, Tensor.addmm, Tensor.addmm_), torch.mm),
    **dict.fromkeys((torch.baddbmm, Tensor.baddbmm, Tensor.baddbmm_), torch.bmm),
    **dict.fromkeys((torch.addbmm, Tensor.addbmm, Tensor.addbmm_), lambda left, right: torch.bmm(left, right).sum(0)),
}

# Other functions that multiply and sum, which are not supported.
_UNSUPPORTED: set[Function] = {
    *(torch.tensordot, torch.inner, Tensor.inner, torch.mv, Tensor.mv, torch.addmv, Tensor.addmv, Tensor.addmv_),
    *(torch.dot, Tensor.dot, torch.vdot, Tensor.vdot, torch.linalg.vecdot, torch.linalg.multi_dot, torch.chain_matmul),
    *(torch.cdist, torch.bilinear, F.multi_head_attention_forward),
}

# Layer functions, whose second argument is the weight.
LAYER_FUNCTIONS: set[Function] = {
    *(LINEAR, F.conv1d, F.conv2d, F.conv3d, torch.conv_tbc),
    *(F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d),
}

# Matmuls that also sum over the batch.
_SUMMING_BATCHES: set[Function] = {torch.addbmm, Tensor.addbmm, Tensor.addbmm_}


class OperandDims(NamedTuple):
    """Dimensions of an operand by their role in a matmul; all others are batch dimensions of both operands."""

    free: tuple[int, ...]  # only this operand contributes them to the result
    contracted: tuple[int, ...]  # summed over


ROWS = OperandDims(free=(-2,), contracted=(-1,))  # of a left operand
COLUMNS = OperandDims(free=(-1,), contracted=(-2,))  # of a right operand


class UnsupportedMatmul(ValueError):
    """A call that multiplies and sums, but is not a matmul of two tensors; the message names the function."""


@dataclass(frozen=True)
class Matmul:
    """A call that multiplies two tensors and sums over the products of their elements."""

    operands: tuple[Tensor, Tensor]  # left and right
    dims: tuple[OperandDims, OperandDims]
    inner_size: int  # number of terms in each sum
    call: Callable[[Tensor, Tensor], Any]  # the same call with other operands
    product: Callable[[Tensor, Tensor], Tensor]  # the matmul alone, without what is added to it
    finish: Callable[[Tensor], Any]  # turns the result of ``product`` into that of ``call``


def match_matmul(function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Matmul | None:
    """The matmul that a call computes; ``None`` if it computes none. Raises ``UnsupportedMatmul``."""
    if function in _UNSUPPORTED:
        raise UnsupportedMatmul(getattr(function, "__name__", str(function)))
    if function is torch.einsum:
        return _einsum(*args)
    if function not in _PLACES:
        return None
    places = _PLACES[function]
    left, right = (args[position] if position < len(args) else kwargs[keyword] for position, keyword in places)

    def call(*replaced: Tensor) -> Any:
        new_args, new_kwargs = list(args), dict(kwargs)
        for (position, keyword), operand in zip(places, replaced, strict=True):
            if position < len(args):
                new_args[position] = operand
            else:
                new_kwargs[keyword] = operand
        return function(*new_args, **new_kwargs)

    dims = _matmul_dims(left, ROWS, function), _matmul_dims(right, COLUMNS, function)
    if function not in _ADDING:
        return Matmul((left, right), dims, left.shape[-1], call, call, lambda sums: sums)
    finish = functools.partial(_add, function, args[0] if args else kwargs["input"], **kwargs)
    return Matmul((left, right), dims, left.shape[-1], call, _ADDING[function], finish)


def _add(function: Function, x: Tensor, sums: Tensor, *, beta: float = 1, alpha: float = 1, **_: Any) -> Tensor:
    """``beta * x + alpha * sums``, in place if ``function`` works in place."""
    sums = alpha * sums if beta == 0 else torch.add(beta * x, sums, alpha=alpha)
    return x.copy_(sums) if function.__name__.endswith("_") else sums


def _matmul_dims(operand: Tensor, dims: OperandDims, function: Function) -> OperandDims:
    if operand.dim() < 2:
        return OperandDims(free=(), contracted=(-1,))
    return dims._replace(contracted=(-3, *dims.contracted)) if function in _SUMMING_BATCHES else dims


def _einsum(equation: str, *operands: Any) -> Matmul | None:
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = tuple(operands[0])
    if len(operands) == 1:
        return None
    if len(operands) > 2:
        raise UnsupportedMatmul(f"einsum {equation!r}, of {len(operands)} operands")
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    first, second = (_indices(part, operand.dim()) for part, operand in zip(inputs.split(","), operands, strict=True))
    letters = inputs.replace(",", "")
    in_result: set[str | int] = {*output} if arrow else {x for x in letters if letters.count(x) == 1}
    if not arrow or "..." in output:
        in_result |= {index for index in (*first, *second) if isinstance(index, int)}
    common = (set(first) & set(second)) - in_result
    if not common:
        return None
    dims = _einsum_dims(first, second, in_result), _einsum_dims(second, first, in_result)
    inner_size = math.prod([operands[0].shape[first.index(index)] for index in common])
    call: Function = lambda left, right: torch.einsum(equation, left, right)  # noqa: E731
    return Matmul((operands[0], operands[1]), dims, inner_size, call, call, lambda sums: sums)


def _indices(letters: str, dims: int) -> list[str | int]:
    """The indices of an einsum operand: letters, and negative numbers for ``...``, which align from the right."""
    before, ellipsis, after = letters.partition("...")
    hidden = dims - len(before) - len(after) if ellipsis else 0
    return [*before, *range(-hidden, 0), *after]


def _einsum_dims(indices: list[str | int], others: list[str | int], in_result: set[str | int]) -> OperandDims:
    # Dimensions of an ellipsis are batch dimensions, even if the other operand has fewer.
    letters = {index for index in indices if isinstance(index, str)}
    free = letters & (in_result - set(others))
    return OperandDims(
        tuple(dim for dim, index in enumerate(indices) if index in free),
        tuple(dim for dim, index in enumerate(indices) if index not in in_result),
    )
