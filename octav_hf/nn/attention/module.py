"""Attention modules of any class, with quantized operands."""

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..granularity import ATTENTION_OPERANDS
from ..holds_frozen_clips import HoldsFrozenClips
from ..linear import LINEAR, QuantizedLinear
from ..quantized_layer import QuantizedLayer
from ..shared_inputs import shared_inputs
from .arithmetic import SIMULATED, AttentionArithmetic
from .matmuls import AttentionMatmuls
from .own_parameters import split_parameters
from .scaled_dot_product_attention import OperandQuantizers


class QuantizedAttention(HoldsFrozenClips):
    """Mixin placed before an attention module's class, whose forward runs unchanged.

    The submodules ``query_quantizer``, ``key_quantizer``, ``probabilities_quantizer`` and ``value_quantizer`` quantize
    the operands. ``convert`` changes the class of an existing module in place.
    """

    attention_name: str
    arithmetic: AttentionArithmetic = SIMULATED

    @staticmethod
    def convert(attention: nn.Module, quantizers: OperandQuantizers, name: str) -> None:
        """Convert ``attention`` in place, with quantizers by operand; ``name`` is for error messages."""
        base: Any = type(attention)
        attention.__class__ = _quantized_class(base)
        assert isinstance(attention, QuantizedAttention)
        for operand, quantizer in quantizers.items():
            attention.add_module(f"{operand}_quantizer", quantizer.train(attention.training))
        attention.attention_name = name

    @property
    def operand_quantizers(self) -> dict[str, nn.Module]:
        return {operand: getattr(self, f"{operand}_quantizer") for operand in ATTENTION_OPERANDS}

    def is_covered(self, state_dict: Mapping[str, Any], prefix: str) -> bool:
        """Whether the state dict has the weights of all quantized layers inside or, without any, all parameters."""
        layers = [(name, module) for name, module in self.named_modules() if isinstance(module, QuantizedLayer)]
        if layers:
            return all(layer.is_covered(state_dict, f"{prefix}{name}.") for name, layer in layers)
        return all(f"{prefix}{name}" in state_dict for name, _ in self.named_parameters())

    def restore(self) -> None:
        """Undo ``convert``."""
        for operand in ATTENTION_OPERANDS:
            delattr(self, f"{operand}_quantizer")
        del self.attention_name
        self.__dict__.pop("arithmetic", None)
        self.__class__ = type(self).__bases__[1]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward, with quantized operands of the attention matmuls.

        Raises:
            RuntimeError: the number of matmuls of an operand is 0 or differs from that of its frozen clips;
                ``torch.export`` is in strict mode; or ``torch.nn.functional.linear`` was replaced and a linear layer
                inside is in float.
        """
        if not torch.compiler.is_dynamo_compiling():
            return self._attend_uncompiled(*args, **kwargs)
        if torch.compiler.is_exporting():
            raise RuntimeError(
                f"{self.attention_name}: torch.export can trace its matmuls only with strict=False; write "
                "torch.export.export(model, …, strict=False)"
            )
        with self._quantized_operands():
            return super().forward(*args, **kwargs)

    # Disabled because, after a graph break inside, the compiled parts would not share the counts of operands.
    @torch.compiler.disable
    def _attend_uncompiled(self, *args: Any, **kwargs: Any) -> Any:
        with shared_inputs(), self._quantized_operands():
            return super().forward(*args, **kwargs)

    @contextmanager
    def _quantized_operands(self) -> Iterator[None]:
        self._check_float_layers()
        parameters = split_parameters(self)
        matmuls = AttentionMatmuls(self.operand_quantizers, lambda: self.attention_name, *parameters, self.arithmetic)
        with matmuls:
            yield
        matmuls.check_complete()

    def _check_float_layers(self) -> None:
        """Refuse float layers if ``linear`` was replaced, because its matmuls would be taken for those of attention."""
        replaced = nn.functional.linear
        if replaced is LINEAR:
            return
        for name, layer in self.named_modules():
            if isinstance(layer, nn.Linear) and not isinstance(layer, QuantizedLinear):
                raise RuntimeError(
                    f"{self.attention_name}.{name}: this layer of shape {tuple(layer.weight.shape)} is in float, and "
                    f"torch.nn.functional.linear was replaced by {replaced.__module__}.{replaced.__qualname__}, whose "
                    "matmuls would be taken for attention matmuls. With DeepSpeed's ZeRO-3, set "
                    '"memory_efficient_linear": false in zero_optimization; otherwise restore the function, or '
                    "quantize the layer"
                )

    def __reduce__(self) -> tuple[Any, ...]:
        # The generated class cannot be imported by name, so its base is pickled.
        return _rebuild, (type(self).__bases__[1],), self.__dict__


@functools.cache
def _quantized_class(base: Any) -> Any:
    return type(f"Quantized{base.__name__}", (QuantizedAttention, base), {"__module__": base.__module__})


def _rebuild(base: Any) -> nn.Module:
    cls = _quantized_class(base)
    return cls.__new__(cls)
