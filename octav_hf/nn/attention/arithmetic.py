"""How an attention module's matmuls are computed from operands and quantizers."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from .match_matmul import Matmul
from .operand_form import quantize_operand
from .scaled_dot_product_attention import quantized_scaled_dot_product_attention


class AttentionArithmetic:
    """Floating-point matmuls of fake-quantized operands; subclasses compute the same by other means."""

    def __str__(self) -> str:
        return ""

    def matmul(self, quantizers: Sequence[Callable[..., Any]], matmul: Matmul) -> Any:
        """The result of a matmul; ``quantizers`` are those of its left and right operand."""
        return matmul.call(*map(quantize_operand, quantizers, matmul.operands, matmul.dims))

    def scaled_dot_product_attention(self, quantizers: Any, *args: Any, **kwargs: Any) -> Tensor:
        """The result of ``quantized_scaled_dot_product_attention`` with these arguments."""
        return quantized_scaled_dot_product_attention(quantizers, *args, **kwargs)


SIMULATED = AttentionArithmetic()
