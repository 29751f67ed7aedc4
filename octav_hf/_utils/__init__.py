"""Helpers that know nothing of quantization."""
