"""How an attention module's matmuls are computed from operands and quantizers."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from .match_matmul import Matmul
from .operand_form import quantize_operand
from .scaled_dot_product_attention import quantized_scaled_dot_product_attention


class AttentionArithmetic:
    """In floating point, on values that lie on the grid; subclasses compute the same otherwise."""

    def __str__(self) -> str:
        return ""

    def matmul(self, quantizers: Sequence[Callable[..., Any]], matmul: Matmul) -> Any:
        """The result of a call, whose left and right operand these quantize."""
        return matmul.call(*map(quantize_operand, quantizers, matmul.operands, matmul.dims))

    def scaled_dot_product_attention(self, quantizers: Any, *args: Any, **kwargs: Any) -> Tensor:
        """``quantized_scaled_dot_product_attention``, whose arguments these are."""
        return quantized_scaled_dot_product_attention(quantizers, *args, **kwargs)


SIMULATED = AttentionArithmetic()
