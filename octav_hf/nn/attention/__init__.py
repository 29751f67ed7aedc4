"""Attention modules whose matmuls run on quantized operands."""
