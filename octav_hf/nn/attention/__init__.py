"""Attention modules with quantized operands of their matmuls."""
