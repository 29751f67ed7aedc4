"""Modules: the quantizer, and the layers whose operands pass through it. Needs nothing but torch."""

from .attention import QuantizedAttention
from .attention_matmuls import ATTENTION_OPERANDS, AttentionMatmuls
from .fake_quantize import FakeQuantize
from .linear import QuantizedLinear
from .scaled_dot_product_attention import quantized_scaled_dot_product_attention

__all__ = [
    "ATTENTION_OPERANDS",
    "AttentionMatmuls",
    "FakeQuantize",
    "QuantizedAttention",
    "QuantizedLinear",
    "quantized_scaled_dot_product_attention",
]
