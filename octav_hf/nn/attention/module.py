"""An attention module, of any class, whose matmuls run on quantized operands."""

import functools
from typing import Any

import torch
from torch import nn

from ..granularity import ATTENTION_OPERANDS
from ..linear import LINEAR, QuantizedLinear
from ..shared_inputs import shared_inputs
from .matmuls import AttentionMatmuls
from .scaled_dot_product_attention import OperandQuantizers


class QuantizedAttention(nn.Module):
    """Mixin put in front of an attention module's own class; that class's forward runs unchanged inside.

    It has a quantizer for each operand: ``query_quantizer``, ``key_quantizer``, ``probabilities_quantizer`` and
    ``value_quantizer``. Made from an existing module by ``convert``, which changes that object's class in place.
    """

    attention_name: str

    @staticmethod
    def convert(attention: nn.Module, quantizers: OperandQuantizers, name: str) -> None:
        """Put the mixin in front of ``attention``'s class in place, with quantizers by operand.

        ``name`` is for error messages.
        """
        base: Any = type(attention)
        attention.__class__ = _quantized_class(base)
        assert isinstance(attention, QuantizedAttention)
        for operand, quantizer in quantizers.items():
            attention.add_module(f"{operand}_quantizer", quantizer)
        attention.attention_name = name

    @property
    def operand_quantizers(self) -> dict[str, nn.Module]:
        """Operand -> its quantizer."""
        return {operand: getattr(self, f"{operand}_quantizer") for operand in ATTENTION_OPERANDS}

    def restore(self) -> None:
        """Give the module its own class back, in place."""
        for operand in ATTENTION_OPERANDS:
            delattr(self, f"{operand}_quantizer")
        del self.attention_name
        self.__class__ = type(self).__bases__[1]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward, its attention matmuls on quantized operands.

        Raises:
            RuntimeError: an operand was never met, so it would have stayed in float; or another number of times than it
                has frozen clips; or ``torch.export`` is asked for its strict mode; or ``torch.nn.functional.linear`` is
                no longer PyTorch's and a linear layer inside the module is in float.
        """
        if torch.compiler.is_dynamo_compiling() and torch.compiler.is_exporting():
            raise RuntimeError(f"{self.attention_name}: torch.export follows its matmuls only with strict=False")
        return self._attend(*args, **kwargs)

    # Compiled, the function mode counts operands more than once, so that frozen clips run out.
    @torch.compiler.disable
    def _attend(self, *args: Any, **kwargs: Any) -> Any:
        self._check_float_layers()
        own_parameters = self.parameters(recurse=False)
        matmuls = AttentionMatmuls(self.operand_quantizers, self.attention_name, own_parameters)
        with shared_inputs(), matmuls:
            output = super().forward(*args, **kwargs)
        matmuls.check_complete()
        return output

    def _check_float_layers(self) -> None:
        """Refuse float layers that would call another function than PyTorch's, with matmuls like attention's own."""
        replaced = nn.functional.linear
        if replaced is LINEAR:
            return
        for name, layer in self.named_modules():
            if isinstance(layer, nn.Linear) and not isinstance(layer, QuantizedLinear):
                raise RuntimeError(
                    f"{self.attention_name}.{name}: this layer of shape {tuple(layer.weight.shape)} is in float, and "
                    f"torch.nn.functional.linear was replaced by {replaced.__module__}.{replaced.__qualname__}, whose "
                    "matmuls would be taken for attention's. With DeepSpeed's ZeRO-3 set \"memory_efficient_linear\": "
                    "false in zero_optimization; else restore the function, or quantize the layer"
                )

    def __reduce__(self) -> tuple[Any, ...]:
        # The class made by _quantized_class cannot be imported by name: pickle its base instead.
        return _rebuild, (type(self).__bases__[1],), self.__dict__


@functools.cache
def _quantized_class(base: Any) -> Any:
    return type(f"Quantized{base.__name__}", (QuantizedAttention, base), {"__module__": base.__module__})


def _rebuild(base: Any) -> nn.Module:
    cls = _quantized_class(base)
    return cls.__new__(cls)
