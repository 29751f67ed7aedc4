"""Check the matmuls in the graph that ONNX Runtime runs: which ones use integers, and whether their sums are exact."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from .._utils.progress import progress

# Operator -> positions of its two operands, of their zero points and, if it scales the sums, of their scales.
_INTEGER_OPERATORS: dict[str, tuple[tuple[int, ...], ...]] = {
    "MatMulIntegerToFloat": ((0, 1), (4, 5), (2, 3)),
    "QLinearMatMul": ((0, 3), (2, 5), (1, 4)),
    "MatMulInteger": ((0, 1), (2, 3), ()),
    "ConvInteger": ((0, 1), (2, 3), ()),
}
_FLOAT_OPERATORS = {
    *("MatMul", "FusedMatMul", "MatMulNBits", "Gemm", "FusedGemm", "Conv", "FusedConv", "Einsum"),
    *("Attention", "MultiHeadAttention", "QAttention"),
}

Array = np.ndarray[Any, Any]


def integer_products(model: Any) -> list[Any]:
    """The nodes of an ``onnx.ModelProto`` with integer matmuls or convolutions."""
    return [node for node in model.graph.node if node.op_type in _INTEGER_OPERATORS]


def float_products(model: Any) -> list[Any]:
    """The nodes with floating-point matmuls, or that quantize floats themselves."""
    return [node for node in model.graph.node if node.op_type in _FLOAT_OPERATORS]


def wrong_products(model: Any, run: Callable[[list[str]], Mapping[str, Array]]) -> Iterator[str]:
    """The integer matmuls of ``model`` whose sums are not exact, as lines of text.

    The sums are recomputed from the operands of the runtime in float64, where they are exact.

    Args:
        model: the optimized ``onnx.ModelProto``.
        run: runs it on a batch and returns the values with the given names.
    """
    import onnx

    known = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    nodes = integer_products(model)
    names = {name for node in nodes for name in (*node.input, *node.output)} - known.keys() - {""}
    values = {**known, **run(sorted(names))}
    for node in progress(nodes, "verifying sums"):
        wrong = _difference(node, values)
        if wrong:
            yield f"{node.name} ({node.op_type}): {wrong}"


def _difference(node: Any, values: Mapping[str, Array]) -> str:
    """How a node's result differs from exact sums; empty if it does not."""
    given = [values[name].astype(np.float64) if name else np.zeros(()) for name in node.input]
    operands, zero_points, scales = (
        [given[place] if place < len(given) else np.zeros(()) for place in places]
        for places in _INTEGER_OPERATORS[node.op_type]
    )
    left, right = (x - zero for x, zero in zip(operands, zero_points, strict=True))
    sums = _convolved(node, left, right) if node.op_type == "ConvInteger" else left @ right
    result = values[node.output[0]]
    scale: Array = math.prod(scales, start=np.ones(()))
    allowed: Any
    if node.op_type == "QLinearMatMul":
        limits = np.iinfo(result.dtype)
        exact = np.clip(sums * scale / given[6] + given[7], limits.min, limits.max)
        error, allowed = np.abs(result - exact), 0.501  # a tie may be rounded either way
    else:
        # float32 cannot represent every large integer.
        error, allowed = np.abs(result / np.where(scale == 0, 1, scale) - sums), 1e-3 + np.abs(sums) * 2**-21
        error = np.where(scale == 0, np.abs(result), error)
    wrong = int((error > allowed).sum())
    return f"{wrong} of {error.size} sums are not exact, the worst by {error.max():.4g}" if wrong else ""


def _convolved(node: Any, x: Array, weight: Array) -> Array:
    sizes: dict[str, Any] = {attribute.name: list(attribute.ints) or attribute.i for attribute in node.attribute}
    begins, ends = np.array_split(sizes["pads"], 2)
    padding = [int(size) for pair in zip(begins[::-1], ends[::-1], strict=True) for size in pair]
    convolve = F.conv1d if weight.ndim == 3 else F.conv2d
    result = convolve(
        F.pad(torch.from_numpy(x), padding),
        torch.from_numpy(weight),
        stride=sizes["strides"],
        dilation=sizes["dilations"],
        groups=int(sizes["group"]),
    )
    return result.numpy()
