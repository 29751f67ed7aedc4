"""Which torch functions return attention probabilities, and which preserve the values of a tensor."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .match_matmul import Function

SOFTMAX: set[Function] = {torch.softmax, torch.special.softmax, Tensor.softmax, F.softmax}

# Functions whose result has the values of the first argument in another shape, order, device or dtype.
_REARRANGING = (
    *("contiguous", "clone", "detach", "cpu", "cuda", "to", "type", "type_as", "float", "double", "half", "bfloat16"),
    *("view", "view_as", "reshape", "reshape_as", "flatten", "unflatten", "squeeze", "unsqueeze", "ravel"),
    *("expand", "expand_as", "repeat", "repeat_interleave", "tile", "broadcast_to", "as_strided", "unfold"),
    *("transpose", "permute", "swapaxes", "swapdims", "movedim", "moveaxis", "t", "flip", "roll"),
    *("split", "tensor_split", "chunk", "unbind", "narrow", "select", "diagonal", "nan_to_num"),
)


def _functions(names: Iterable[str]) -> set[Function]:
    """The tensor methods and torch functions with these names."""
    owners: tuple[Any, ...] = (Tensor, torch)
    return {function for name in names for owner in owners if (function := getattr(owner, name, None))}


LOOKUPS = _functions(("__getitem__", "gather", "take_along_dim", "index_select", "masked_select"))
_KEEPING: set[Function] = {F.dropout, torch.dropout}
_KEEPING |= LOOKUPS | _functions(_REARRANGING)
_KEEPING |= {getattr(Tensor, name).__get__ for name in ("T", "mT", "H", "mH", "data")}
# Functions that fill in or multiply by a number, which must not be negative -> where they take it.
_WITH_NUMBER: dict[Function, tuple[int, str]] = {
    **dict.fromkeys((torch.masked_fill, Tensor.masked_fill, Tensor.masked_fill_), (2, "value")),
    F.pad: (3, "value"),
    **dict.fromkeys((torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__, torch.div, Tensor.div), (1, "other")),
    Tensor.__truediv__: (1, "other"),
}
_JOINING: set[Function] = {torch.cat, torch.concat, torch.stack}


def keeps_values(
    function: Function, args: tuple[Any, ...], kwargs: dict[str, Any], is_known: Callable[[Any], bool]
) -> bool:
    """Whether a call's result has only values of known tensors, multiples of them by a number >= 0, and fill values."""
    if not args:
        return False
    if function in _JOINING:
        return all(is_known(part) for part in args[0])
    if not is_known(args[0]):
        return False
    if function in _WITH_NUMBER:
        position, keyword = _WITH_NUMBER[function]
        number = args[position] if position < len(args) else kwargs.get(keyword)
        return number is None or (isinstance(number, int | float) and number >= 0)
    return function in _KEEPING
