"""Quantization-aware training with OCTAV clips for Transformers models."""

from ._version import __version__

__all__ = ["__version__"]
