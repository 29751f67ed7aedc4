"""Models for other runtimes: ONNX files whose quantized matmuls multiply integers."""

from .to_onnx import to_onnx
