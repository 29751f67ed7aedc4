"""Integer matmuls with a weight, with exact sums before scaling; the only file that calls torch's quantized kernels.

oneDNN's kernels take uint8 codes and scale their int32 sums themselves. Without VNNI they multiply with ``vpmaddubsw``,
which adds two products in 16 bits and saturates: 255 * -128 twice overflows, so an 8-bit weight with 8-bit codes is
split in two. Processors without AVX2 multiply integer-valued floats, with exact sums.
"""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .._utils.torch_private import LINEAR
from ..functional.grid import integer_range
from ..functional.kernels.operations import operation
from ..nn import QuantizedConvolution
from ..nn.codes import Codes


class Kernel:
    """The matmul of a layer's input ``Codes`` and its integer weight, scaled, plus the bias.

    Args:
        layer: the linear layer or convolution.
        integers: integers of the weight, int8 ``[out, in]`` or ``[out, in / groups, *window]``.
        num_bits: bits of the codes and of the weight.
    """

    dtype: torch.dtype  # of the codes

    def __init__(self, layer: Any, integers: Tensor, num_bits: tuple[int, int]):
        raise NotImplementedError

    def __call__(self, codes: Codes, step: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        """The layer's output for values ``step * k`` and a weight ``scale * integers``.

        Args:
            codes: the layer's input; its scale and offset are not used.
            step: step of the codes, ``[]``.
            scale: scales of the weight, ``[out]``.
            bias: ``[out]``.
        """
        raise NotImplementedError

    def __str__(self) -> str:
        return f"integers, {type(self).__name__}"


class OneDNN(Kernel):
    """oneDNN, which takes uint8 codes, scales and adds the bias; it pads convolutions with the code of zero."""

    dtype = torch.uint8

    def __init__(self, layer: Any, integers: Tensor, num_bits: tuple[int, int]):
        parts = _parts(integers, num_bits)
        self._zero_points = torch.zeros(len(integers), dtype=torch.int32, device=integers.device)
        self._multiply: Any
        self._window: tuple[Any, ...] = ()
        if integers.dim() > 2:
            window = *(list(x) for x in (layer.stride, layer.padding, layer.dilation)), layer.groups
            scales = torch.ones(len(integers), dtype=torch.float32, device=integers.device)
            self._weights = [torch.ops.onednn.qconv_prepack(part, scales, 1.0, 0, *window) for part in parts]
            self._multiply, self._window = multiply_convolution, (list(integers.shape[2:]), *window)
        else:
            self._weights = [torch.ops.onednn.qlinear_prepack(part, None) for part in parts]
            self._multiply = multiply_linear

    def __call__(self, codes: Codes, step: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        multiply, lowest = self._multiply, codes.lowest
        if torch.compiler.is_compiling():
            lowest = torch.as_tensor(lowest, dtype=torch.int32, device="cpu")
        else:
            multiply = multiply.reference
        first, *others = self._weights
        scaling = scale, self._zero_points
        result = multiply(codes.integers, step, lowest, first, *scaling, bias, *self._window)
        for weight in others:
            result.add_(multiply(codes.integers, step, lowest, weight, *scaling, None, *self._window))
        return result


_ARGUMENTS = "Tensor x, Tensor step, Tensor lowest, Tensor weight, Tensor scale, Tensor zero_points, Tensor? bias"
_TO_FLOAT = 1.0, 0, torch.float32


# Custom operations, because Inductor supports oneDNN's operations only with constant weights.
@operation(
    f"({_ARGUMENTS}) -> Tensor",
    lambda x, step, lowest, weight, *_: x.new_empty([*x.shape[:-1], weight.shape[-1]], dtype=torch.float32),
)
def multiply_linear(
    x: Tensor, step: Tensor, lowest: Any, weight: Tensor, scale: Tensor, zero_points: Tensor, bias: Tensor | None
) -> Tensor:
    if x.numel() == 0:  # oneDNN loses dimensions of empty tensors
        return x.new_zeros([*x.shape[:-1], weight.shape[-1]], dtype=torch.float32)
    return torch.ops.onednn.qlinear_pointwise(
        x, float(step), -int(lowest), weight, scale, zero_points, bias, *_TO_FLOAT, "none", [], ""
    )


def _empty_convolution(x: Tensor, *arguments: Any) -> Tensor:
    zero_points, _, size, stride, padding, dilation, _ = arguments[4:]
    space = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(x.shape[-len(size) :], size, stride, padding, dilation, strict=True)
    ]
    lead = x.shape[: -len(size) - 1]
    return torch.empty(
        [*lead, len(zero_points), *space], dtype=torch.float32, device=x.device, memory_format=_memory_format(x)
    )


def _memory_format(x: Tensor) -> torch.memory_format:
    """That of the result, as in the float layer."""
    others = {4: torch.channels_last, 5: torch.channels_last_3d}
    is_other = not x.is_contiguous() and x.dim() in others and x.is_contiguous(memory_format=others[x.dim()])
    return others[x.dim()] if is_other else torch.contiguous_format


@operation(
    f"({_ARGUMENTS}, int[] size, int[] stride, int[] padding, int[] dilation, int groups) -> Tensor", _empty_convolution
)
def multiply_convolution(
    x: Tensor, step: Tensor, lowest: Any, weight: Tensor, scale: Tensor, zero_points: Tensor, bias: Tensor | None,
    size: list[int], stride: list[int], padding: list[int], dilation: list[int], groups: int,
) -> Tensor:  # fmt: skip
    window = stride, padding, dilation, groups
    if x.numel() == 0:  # oneDNN returns another number of dimensions
        return _empty_convolution(x, step, lowest, weight, scale, zero_points, bias, size, *window).zero_()
    batched = x if x.dim() == len(size) + 2 else x[None]
    result = torch.ops.onednn.qconv_pointwise(
        batched, float(step), -int(lowest), weight, scale, zero_points, bias, *window, *_TO_FLOAT, "none", [], None
    )
    return (result if batched is x else result[0]).contiguous(memory_format=_memory_format(x))


class Float(Kernel):
    """The fallback: integer-valued floats in ``dtype``; the weight is converted at every call."""

    def __init__(
        self, layer: Any, integers: Tensor, num_bits: tuple[int, int], dtype: torch.dtype | None = None, why: str = ""
    ):
        self._why = why
        self._layer = layer if isinstance(layer, QuantizedConvolution) else None
        self._integers = integers
        is_exact = integers[0].numel() * _largest_product(num_bits) < 2**24
        # On other devices, convolution algorithms may transform the operands, which is not exact in float32.
        is_plain = self._layer is None or integers.device.type == "cpu"
        self.dtype = dtype or (torch.float32 if is_exact and is_plain else torch.float64)

    def __call__(self, codes: Codes, step: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        integers = self._integers.to(self.dtype)
        if self._layer is None:
            return scaled(LINEAR(codes.integers, integers), step * scale, bias)
        window = (1,) * (integers.dim() - 2)
        sums = self._layer._conv_forward(codes.integers, integers, None)
        return scaled(sums, (step * scale).view(-1, *window), None if bias is None else bias.view(-1, *window))

    def __str__(self) -> str:
        return f"integers as {str(self.dtype).removeprefix('torch.')} {self._why}"


def multiply(
    product: Callable[[Tensor, Tensor], Tensor], left: Codes, right: Codes, terms: int, reference: bool = False
) -> Tensor:
    """The exact matmul of the integers of two operands, in float32 if that is exact, otherwise in float64.

    Args:
        product: the matmul, such as ``torch.matmul``.
        terms: number of products per sum.
        reference: always compute in float64.
    """
    is_exact = terms * left.largest * right.largest < 2**24 and not reference
    dtype = torch.float32 if is_exact else torch.float64
    return product(left.integers.to(dtype), right.integers.to(dtype))


def scaled(sums: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """``sums * scale + bias``, in the wider dtype of scale and sums."""
    return sums * scale if bias is None else torch.addcmul(bias.to(sums.dtype), sums, scale)


def saturates(num_bits: tuple[int, int]) -> bool:
    """Whether the sum of two products of codes and weights with these bits can overflow 16 bits."""
    return 2 * _largest_product(num_bits) >= 2**15


def _parts(integers: Tensor, num_bits: tuple[int, int]) -> list[Tensor]:
    """Weights whose sum is the weight and of whose sums none saturates on this processor."""
    if _has_vnni() or not saturates(num_bits):
        return [integers]
    half = integers >> 1
    return [half, integers - half]


def _has_vnni() -> bool:
    return torch.cpu.get_capabilities().get("avx512_vnni", False)


def _largest_product(num_bits: tuple[int, int]) -> int:
    return (2 ** num_bits[0] - 1) * 2 ** (num_bits[1] - 1)


def kernel_for(layer: Any, integers: Tensor, num_bits: tuple[int, int], dtype: torch.dtype) -> Kernel:
    """The fastest exact kernel for a layer and codes whose scale has ``dtype``; ``Float`` if there is no other."""
    is_exact = _is_exact(isinstance(layer, QuantizedConvolution), num_bits)
    reason = "" if is_exact else "because this processor has no exact integer kernel"
    if integers[0].numel() * _largest_product(num_bits) >= 2**31:
        reason = "because sums may overflow 32 bits"
    if isinstance(layer, QuantizedConvolution) and (layer.padding_mode != "zeros" or isinstance(layer.padding, str)):
        reason = "because a convolution does not pad with a fixed number of zeros"
    if dtype != torch.float32:
        reason = f"for values in {dtype}"
    if integers.device.type != "cpu":
        reason = f"on the device {integers.device.type}"
    if reason:
        _warn_of_fallback(reason)
        return Float(layer, integers, num_bits, why=reason)
    return OneDNN(layer, integers, num_bits)


@functools.cache
def _is_exact(is_convolution: bool, num_bits: tuple[int, int]) -> bool:
    """Whether this processor has AVX2, and oneDNN is exact in a test with the largest codes."""
    if not torch.cpu.get_capabilities().get("avx2", False):
        return False  # oneDNN would be exact, but slower than floats
    low, high = integer_range(num_bits[1], signed=True)
    weight = torch.tensor([[low] * 64, [high] * 64, [low, high] * 32], dtype=torch.int8, device="cpu")
    codes = torch.tensor([[0] * 64, [2 ** num_bits[0] - 1] * 64], dtype=torch.int64, device="cpu")
    expected = codes @ weight.long().t()
    layer: nn.Module = nn.Linear(64, 3, device="cpu", dtype=torch.float32)
    if is_convolution:
        layer = nn.Conv1d(64, 3, 1, device="cpu", dtype=torch.float32)
        weight, codes, expected = weight[..., None], codes[..., None], expected[..., None]
    one = torch.ones(1, dtype=torch.float32, device="cpu")
    try:
        run = OneDNN(layer, weight, num_bits)
        sums = run(Codes(codes.to(run.dtype), 0, num_bits[0], one), one[0], one, None)
    except RuntimeError:
        return False
    return torch.equal(sums.long(), expected)


@functools.cache
def _warn_of_fallback(reason: str) -> None:
    warnings.warn(f"Integer matmuls are computed in floating point, exactly but more slowly, {reason}", stacklevel=2)
