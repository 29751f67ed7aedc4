"""Helpers that do not depend on quantization."""
