"""Products with an integer weight, exact before scaling: the one file with torch's quantized kernels.

oneDNN's kernel takes uint8 codes and scales its int32 sums itself; it needs AVX512-VNNI. FBGEMM's runs on every x86, by
way of ``vpmaddubsw``, which adds two products in 16 bits and saturates: 255 * -128 twice does not fit, so the 8-bit
weight of 8-bit codes is split in two. Elsewhere products are of integer-valued floats, while all sums are exact.
"""

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .._utils.torch_private import LINEAR
from ..functional.grid import integer_range
from ..nn.codes import Codes


class Kernel:
    """``(step * k) @ (scale * integers).T + bias`` for one weight and the integers k of ``Codes``.

    Args:
        integers: the weight's, int8 ``[out, in]``.
        num_bits: of the codes, and of the weight.
    """

    dtype: torch.dtype  # of the codes

    def __init__(self, integers: Tensor, num_bits: tuple[int, int]):
        raise NotImplementedError

    def __call__(self, codes: Codes, step: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        """The scaled sums, ``[..., out]``.

        Args:
            codes: ``[..., in]``; its scale and offset are not used.
            step: ``[]``, of the codes.
            scale: ``[out]`` or ``[1]``, of the weight.
            bias: ``[out]``.
        """
        raise NotImplementedError


class OneDNN(Kernel):
    """Of uint8 codes, by oneDNN, which scales and adds the bias itself."""

    dtype = torch.uint8

    def __init__(self, integers: Tensor, num_bits: tuple[int, int]):
        self._weight = torch.ops.onednn.qlinear_prepack(integers, None)
        self._zero_points = torch.zeros(len(integers), dtype=torch.int32, device=integers.device)

    def __call__(self, codes: Codes, step: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        weight = self._weight, scale, self._zero_points[: len(scale)], bias
        return torch.ops.onednn.qlinear_pointwise(
            codes.integers, float(step), -int(codes.lowest), *weight, 1.0, 0, torch.float32, "none", [], ""
        )


class FBGEMM(Kernel):
    """Of integer-valued floats, by FBGEMM, which converts them to uint8 codes."""

    dtype = torch.float32

    def __init__(self, integers: Tensor, num_bits: tuple[int, int]):
        upper = integers >> 1
        parts = [upper, integers - upper] if saturates(num_bits) else [integers]
        with warnings.catch_warnings(), _engine("fbgemm"):
            warnings.simplefilter("ignore")  # torch means to remove the type of tensor that holds the weight
            self._weights = [torch.ops.quantized.linear_prepack(_with_scale_one(part), None) for part in parts]

    def __call__(self, codes: Codes, step: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        multiply = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32
        sums = [multiply(codes.integers, 1.0, -int(codes.lowest), weight) for weight in self._weights]
        return scaled(sums[0] if len(sums) == 1 else sums[0].add_(sums[1]), step * scale, bias)


class Float(Kernel):
    """Of integer-valued floats, in ``dtype``; the weight is converted at every call."""

    def __init__(self, integers: Tensor, num_bits: tuple[int, int], dtype: torch.dtype | None = None):
        self._integers = integers
        self.dtype = dtype or float_dtype(integers.shape[1], num_bits)

    def __call__(self, codes: Codes, step: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        return scaled(LINEAR(codes.integers, self._integers.to(self.dtype)), step * scale, bias)


def multiply(
    product: Callable[[Tensor, Tensor], Tensor], left: Codes, right: Codes, terms: int, reference: bool = False
) -> Tensor:
    """The sums of products of two tensors' integers, which have a dtype of float: exact, float32 or float64.

    Args:
        product: multiplies and sums, such as ``torch.matmul``.
        terms: how many products a sum has.
        reference: always in float64.
    """
    is_exact = terms * left.largest * right.largest < 2**24 and not reference
    dtype = torch.float32 if is_exact else torch.float64
    return product(left.integers.to(dtype), right.integers.to(dtype))


def scaled(sums: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """``sums * scale + bias``, in the dtype of the scale or of the sums, whichever is wider."""
    return (
        sums * scale
        if bias is None
        else torch.addcmul(bias.to(torch.promote_types(sums.dtype, scale.dtype)), sums, scale)
    )


def saturates(num_bits: tuple[int, int]) -> bool:
    """Whether two products of uint8 codes and a weight, of these bits, can be too large for 16 bits."""
    return 2 * _largest_product(num_bits) >= 2**15


def float_dtype(terms: int, num_bits: tuple[int, int]) -> torch.dtype:
    """float32 if it holds sums of so many products exactly, else float64."""
    return torch.float32 if terms * _largest_product(num_bits) < 2**24 else torch.float64


def _largest_product(num_bits: tuple[int, int]) -> int:
    return (2 ** num_bits[0] - 1) * 2 ** (num_bits[1] - 1)


def kernel_for(integers: Tensor, num_bits: tuple[int, int], dtype: torch.dtype) -> Kernel:
    """The fastest exact kernel that there is for a weight, int8 ``[out, in]``, and codes whose scale has ``dtype``."""
    reason = "they are too long for 32-bit sums" if integers.shape[1] * _largest_product(num_bits) >= 2**31 else ""
    if dtype != torch.float32:
        reason = f"of a model in {dtype}"
    if integers.device.type != "cpu":
        reason = f"on {integers.device.type}"
    kernel = None if reason else _exact_kernel(num_bits)
    if kernel is None:
        _warn_of_fallback(reason or "since this processor's integer kernels fail or are not exact")
        return Float(integers, num_bits)
    return kernel(integers, num_bits)


@functools.cache
def _exact_kernel(num_bits: tuple[int, int]) -> type[Kernel] | None:
    """The kernel for this processor, if it proves to be exact for the largest codes."""
    kernel = OneDNN if torch.cpu.get_capabilities().get("avx512_vnni", False) else FBGEMM
    low, high = integer_range(num_bits[1], signed=True)
    weight = torch.tensor([[low] * 64, [high] * 64, [low, high] * 32], dtype=torch.int8, device="cpu")
    codes = torch.tensor([[0] * 64, [2 ** num_bits[0] - 1] * 64], dtype=torch.int64, device="cpu")
    one = torch.ones(1, dtype=torch.float32, device="cpu")
    try:
        sums = kernel(weight, num_bits)(Codes(codes.to(kernel.dtype), 0, num_bits[0], one), one[0], one, None)
    except RuntimeError:
        return None
    return kernel if torch.equal(sums.long(), codes @ weight.long().t()) else None


@functools.cache
def _warn_of_fallback(reason: str) -> None:
    warnings.warn(f"Integer products are computed in floating point, exactly but slower, {reason}", stacklevel=2)


@contextmanager
def _engine(name: str) -> Iterator[None]:
    """torch's engine for quantized weights that are made inside."""
    before, torch.backends.quantized.engine = torch.backends.quantized.engine, name
    try:
        yield
    finally:
        torch.backends.quantized.engine = before


def _with_scale_one(integers: Tensor) -> Tensor:
    return torch.quantize_per_tensor(integers.float(), 1.0, 0, torch.qint8)
