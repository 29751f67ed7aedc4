"""Which torch functions multiply two tensors and add up, and where their operands are."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

Function = Callable[..., Any]


class Place(NamedTuple):
    """Where a function takes an operand: position and keyword."""

    position: int
    keyword: str


_MATMUL = Place(0, "input"), Place(1, "other")
_METHOD = Place(0, "self"), Place(1, "other")
_MM = Place(0, "input"), Place(1, "mat2")
_ADDMM = Place(1, "mat1"), Place(2, "mat2")
_BADDBMM = Place(1, "batch1"), Place(2, "batch2")

# Function -> places of the left and the right operand.
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

# Functions that multiply and add up in a way of their own.
_UNKNOWN: set[Function] = {
    *(torch.tensordot, torch.inner, Tensor.inner, torch.mv, Tensor.mv, torch.addmv, Tensor.addmv, Tensor.addmv_),
    *(torch.dot, Tensor.dot, torch.vdot, Tensor.vdot, torch.linalg.vecdot, torch.linalg.multi_dot, torch.chain_matmul),
    *(torch.cdist, torch.bilinear, F.multi_head_attention_forward),
}


class UnknownProduct(ValueError):
    """A call that multiplies and adds up in another way than as a product of two tensors; says which."""


@dataclass(frozen=True)
class Product:
    """A call that multiplies two tensors and adds up.

    Args:
        operands: the left and the right one.
        inner_size: how many terms each sum has.
        call: the same call on other operands.
    """

    operands: tuple[Tensor, Tensor]
    inner_size: int
    call: Callable[[Tensor, Tensor], Any]


def find_product(function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Product | None:
    """The product that this call computes, or ``None`` if it computes none.

    Raises:
        UnknownProduct: the call multiplies in another way.
    """
    if function in _UNKNOWN:
        raise UnknownProduct(getattr(function, "__name__", str(function)))
    if function is torch.einsum:
        return _einsum(*args)
    if function not in _PLACES:
        return None
    left, right = _PLACES[function]
    operands = _get(left, args, kwargs), _get(right, args, kwargs)

    def call(*replaced: Tensor) -> Any:
        new_args, new_kwargs = list(args), dict(kwargs)
        for place, operand in zip((left, right), replaced, strict=True):
            if place.position < len(args):
                new_args[place.position] = operand
            else:
                new_kwargs[place.keyword] = operand
        return function(*new_args, **new_kwargs)

    return Product(operands, operands[0].shape[-1], call)


def _get(place: Place, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return args[place.position] if place.position < len(args) else kwargs[place.keyword]


def _einsum(equation: str, *operands: Any) -> Product | None:
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = tuple(operands[0])
    if len(operands) == 1:
        return None
    if len(operands) > 2:
        raise UnknownProduct(f"einsum {equation!r}, of {len(operands)} operands")
    inner_size = _summed_size(equation, operands[0])
    if inner_size is None:
        return None
    return Product((operands[0], operands[1]), inner_size, lambda left, right: torch.einsum(equation, left, right))


def _summed_size(equation: str, left: Tensor) -> int | None:
    """How many terms each sum of the two operands' products has; ``None`` where nothing in common is summed over."""
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    first, second = inputs.split(",")
    both = set(first.replace(".", "")) & set(second.replace(".", ""))
    summed = both - set(output) if arrow else both
    if not summed:
        return None
    before, _, after = first.partition("...")
    sizes = dict(zip(before, left.shape, strict=False))
    sizes |= dict(zip(reversed(after), reversed(left.shape), strict=False))
    return math.prod(sizes[index] for index in summed)
