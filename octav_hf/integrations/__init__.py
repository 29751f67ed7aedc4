"""Hooks into other libraries; importing this registers them."""

from .transformers_quantizer import OctavQuantizer

__all__ = ["OctavQuantizer"]
