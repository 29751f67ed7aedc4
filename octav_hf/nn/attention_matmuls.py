"""Finds the two matmuls of an attention module while its forward runs, and quantizes their operands."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .scaled_dot_product_attention import quantized_scaled_dot_product_attention

ATTENTION_OPERANDS = ("query", "key", "probabilities", "value")

# Function -> positions of the two operands that are multiplied.
_MATMULS: dict[Callable[..., Any], tuple[int, int]] = {
    torch.matmul: (0, 1),
    torch.bmm: (0, 1),
    torch.baddbmm: (1, 2),
    Tensor.matmul: (0, 1),
    Tensor.__matmul__: (0, 1),
    Tensor.bmm: (0, 1),
    Tensor.baddbmm: (1, 2),
}
_SOFTMAX = {torch.softmax, Tensor.softmax, F.softmax}
# What leaves probabilities recognisable as such: elementwise, or only another view of them.
_PRESERVING = {
    F.dropout,
    torch.dropout,
    Tensor.to,
    Tensor.type,
    Tensor.type_as,
    Tensor.float,
    Tensor.half,
    Tensor.bfloat16,
    Tensor.contiguous,
    Tensor.view,
    Tensor.reshape,
    Tensor.masked_fill,
    Tensor.transpose,
    Tensor.permute,
    torch.transpose,
    torch.permute,
    torch.masked_fill,
    torch.reshape,
}
_UNREACHABLE = {torch.einsum, torch.addbmm, Tensor.addbmm, F.multi_head_attention_forward}


class AttentionMatmuls(TorchFunctionMode):
    """While active, every attention matmul and ``scaled_dot_product_attention`` runs on quantized operands.

    The operands are told apart by their place: before the softmax the first is the query and the second the key; the
    output of the softmax, through dropout and changes of dtype or shape, is the probabilities, and what it is
    multiplied with is the value. Scores, masks, softmax and the attention implementation stay as they are.

    Args:
        quantizers: modules named after ``ATTENTION_OPERANDS``.
        name: the attention module's name, for error messages.
    """

    def __init__(self, quantizers: nn.ModuleDict, name: str):
        super().__init__()
        self._quantizers = quantizers
        self._name = name
        self._probabilities: list[Tensor] = []
        self._quantized: set[str] = set()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _MATMULS:
            return self._matmul(func, args, kwargs)
        if func is F.scaled_dot_product_attention:
            self._quantized.update(ATTENTION_OPERANDS)
            return quantized_scaled_dot_product_attention(self._quantizers, *args, **kwargs)
        if func in _UNREACHABLE:
            raise NotImplementedError(
                f"{self._name}: its attention multiplies with {getattr(func, '__name__', func)}, whose operands cannot "
                "be quantized; set quantize_attention=False, or name the module in exclude_modules"
            )
        result = func(*args, **kwargs)
        if func in _SOFTMAX or (func in _PRESERVING and self._is_probabilities(args[0])):
            self._probabilities.append(result)
        return result

    def check_complete(self) -> None:
        """Raise ``RuntimeError`` unless all four operands have been quantized since this mode was made."""
        missing = [operand for operand in ATTENTION_OPERANDS if operand not in self._quantized]
        if missing:
            raise RuntimeError(
                f"{self._name}: its forward ran without a matmul on the attention operand(s) {', '.join(missing)}, so "
                "they were not quantized (a fused attention kernel?); load the model with attn_implementation='sdpa' "
                "or 'eager', or set quantize_attention=False"
            )

    def _matmul(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        positions = _MATMULS[func]
        if len(args) <= positions[1]:
            raise NotImplementedError(
                f"{self._name}: {func.__name__} is called with its operands as keyword arguments, where they cannot be "
                "told apart; set quantize_attention=False, or name the module in exclude_modules"
            )
        operands = [args[position] for position in positions]
        attending = [self._is_probabilities(operand) for operand in operands]
        if any(attending):
            names = ("probabilities", "value") if attending[0] else ("value", "probabilities")
        else:
            names = ("query", "key")
        new_args = list(args)
        for position, operand, name in zip(positions, operands, names, strict=True):
            new_args[position] = self._quantizers[name](operand)
        self._quantized.update(names)
        return func(*new_args, **kwargs)

    def _is_probabilities(self, tensor: Any) -> bool:
        return any(tensor is known for known in self._probabilities)
