"""Models for other runtimes: ONNX files whose quantized matmuls multiply integers."""

from .to_onnx import to_onnx
from .verify import OnnxCheck, verify_onnx

__all__ = ["OnnxCheck", "to_onnx", "verify_onnx"]
