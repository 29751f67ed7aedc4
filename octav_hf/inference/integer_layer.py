"""Integer matmuls of packed layers."""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from .._utils.torch_private import has_values, version_counter
from ..nn import PackedLayer
from ..nn.codes import Codes
from ..nn.function_modes import outside_function_modes
from ..nn.shared_inputs import quantize_input
from .integer_matmul import Float, Kernel, kernel_for, scaled


class Plan:
    """Everything that is precomputed from a packed layer's weight.

    Attributes:
        kernel: holds the weight's integers.
        scale: scales of the weight, ``[out]``.
        sums: row sums of the dequantized weight, ``[out]``; an offset of the input is multiplied by them.
    """

    def __init__(self, layer: Any, reference: bool):
        packed = layer.weight_quantizer
        integers = packed.integers()
        if layer.float_class is Conv1D:
            integers = integers.t().contiguous()
        num_bits = layer.input_quantizer.num_bits, packed.num_bits
        self.kernel: Kernel
        if reference:
            self.kernel = Float(layer, integers, num_bits, torch.float64)
        else:
            self.kernel = kernel_for(layer, integers, num_bits, packed.scale.dtype)
        self.scale = packed.scale.expand(len(integers)).contiguous()
        self.sums = integers.flatten(1).sum(dim=1) * self.scale

    def __call__(self, codes: Codes, bias: Tensor | None) -> Tensor:
        """The layer's output."""
        bias = None if bias is None else bias.to(self.scale.dtype)
        if codes.offset is not None:
            bias = codes.offset * self.sums + (0 if bias is None else bias)
        if not codes.is_granular:
            return self.kernel(codes, codes.scale.reshape(()), self.scale, bias)
        one = torch.ones((), dtype=self.scale.dtype, device=self.scale.device)
        return scaled(self.kernel(codes, one, self.scale, None), codes.scale, bias)


class IntegerArithmetic:
    """The ``arithmetic`` of a packed layer: an integer matmul of input and weight, followed by scaling.

    Args:
        layer: the packed layer.
        reference: compute the matmul in float64.
    """

    def __init__(self, layer: PackedLayer, reference: bool):
        self.reference = reference
        self._made: tuple[Plan, tuple[Tensor, Tensor], list[int | None]] | None = None
        self.prepare(layer)

    def prepare(self, layer: Any) -> None:
        """Make the plan now and whenever the packed weight is moved or loaded: a compiler cannot, nor sees that."""
        packed = layer.weight_quantizer
        packed.on_change = partial(self.prepare, layer)
        if has_values(packed.packed_data):
            self._plan(layer)

    @outside_function_modes  # saves a Python call per operation for layers inside an attention module
    def __call__(self, layer: Any, input: Tensor) -> Tensor:
        _check_shape(layer, input.shape)
        plan = self._plan(layer)
        codes = quantize_input(layer.input_quantizer, input, codes=plan.kernel.dtype)
        return plan(codes, layer.bias).to(input.dtype)

    def _plan(self, layer: Any) -> Plan:
        """The plan; recomputed if the packed weight was moved or loaded, or if this is a copy."""
        if self._made is not None and torch.compiler.is_compiling():
            return self._made[0]
        packed = layer.weight_quantizer
        tensors = packed.packed_data, packed.scale
        versions = [None if x.is_inference() else version_counter(x) for x in tensors]
        made = self._made
        if made is None or made[2] != versions or any(old is not x for old, x in zip(made[1], tensors, strict=True)):
            self._made = made = Plan(layer, self.reference), tensors, versions
        return made[0]

    def __str__(self) -> str:
        """How the matmul is computed, for the coverage report."""
        if self.reference:
            return "integers as float64"
        return "integers" if self._made is None else str(self._made[0].kernel)

    def __getstate__(self) -> dict[str, Any]:
        return {"reference": self.reference, "_made": None}


def _check_shape(layer: Any, shape: torch.Size) -> None:
    """Raise ``RuntimeError``, as the float layer does, for a shape of the input that does not fit the weight."""
    packed = layer.weight_quantizer
    size = packed.shape[2:]
    if size:
        fits = len(shape) - len(size) in (1, 2) and shape[-len(size) - 1] == packed.shape[1] * layer.groups
        if fits and not isinstance(layer.padding, str):
            window = zip(shape[-len(size) :], size, layer.padding, layer.dilation, strict=True)
            fits = all(n + 2 * p > d * (k - 1) for n, k, p, d in window)
    else:
        fits = len(shape) > 0 and shape[-1] == packed.shape[0 if layer.float_class is Conv1D else 1]
    if not fits:
        raise RuntimeError(
            f"{packed.name.removesuffix(' weight')}: an input of shape {tuple(shape)} does not fit this "
            f"{layer.float_class.__name__} with a weight of shape {tuple(packed.shape)}"
        )
