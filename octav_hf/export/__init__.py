"""Export to other runtimes: ONNX files with integer matmuls."""

from .to_onnx import to_onnx
from .verify import OnnxCheck, verify_onnx

__all__ = ["OnnxCheck", "to_onnx", "verify_onnx"]
