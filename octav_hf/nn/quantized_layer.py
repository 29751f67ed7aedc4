"""What layers with a quantized weight have in common, and the registry of which float layer becomes which."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeVar

from torch import nn

from .fake_quantize import FakeQuantize
from .granularity import WEIGHT_GRANULARITIES, Granularity
from .weight_fake_quantize import WeightFakeQuantize


class QuantizedLayer(nn.Module):
    """Mixin in front of a float layer's class; each operand has a quantizer ``<operand>_quantizer``.

    A quantized layer is made from an existing one by ``convert``, which changes that object's class in place:
    parameters, their names, hooks and every reference to the module stay as they were.

    Attributes:
        kind: what the layer is called in reports.
        operands: those that have a quantizer (``nn.Identity`` leaves one in float), and the setting that says to how
            many bits.
        clip_dim: the dimensions that share a clip in what ``weight_quantizer`` is given, so that each row has its own.
        weight_quantizer_class: the class of ``weight_quantizer``.
        weight_granularities: what one clip of the weight can be for.
        input_granularities: what one clip of the input can be for: those of ``ACTIVATION_GRANULARITIES["input"]`` for
            which the scale factors out of what the layer sums over.
        supports_asymmetric_input: whether the input's offset factors out, as one number for each output feature.
        float_class: the layer's class before conversion, set by ``register_quantized_layer``.
    """

    kind: ClassVar[str]
    operands: ClassVar[Mapping[str, str]] = {"weight": "weight_bits", "input": "activation_bits"}
    clip_dim: ClassVar[tuple[int, ...]]
    weight_quantizer_class: ClassVar[type[FakeQuantize]] = WeightFakeQuantize
    weight_granularities: ClassVar[tuple[Granularity, ...]] = WEIGHT_GRANULARITIES
    input_granularities: ClassVar[tuple[Granularity, ...]] = (Granularity.TENSOR,)
    supports_asymmetric_input: ClassVar[bool] = False
    float_class: ClassVar[type[nn.Module]]

    weight_quantizer: nn.Module
    input_quantizer: nn.Module

    @classmethod
    def unsupported_reason(cls, layer: nn.Module) -> str:
        """Why this ``layer``, exactly a ``float_class``, cannot be converted and what to do; empty if it can."""
        return ""

    @classmethod
    def convert(cls, layer: nn.Module, quantizers: Mapping[str, nn.Module]) -> None:
        """Turn ``layer``, exactly a ``float_class``, into this class in place, with a quantizer for each operand."""
        layer.__class__ = cls
        for operand, quantizer in quantizers.items():
            layer.add_module(f"{operand}_quantizer", quantizer)

    def restore(self) -> None:
        """Turn this layer back into the float layer it was, in place."""
        for operand in self.operands:
            delattr(self, f"{operand}_quantizer")
        self.__class__ = self.float_class  # type: ignore[assignment]


QUANTIZED_LAYERS: dict[type[nn.Module], type[QuantizedLayer]] = {}
"""Float layer's class -> the class it is converted to."""

Layer = TypeVar("Layer", bound=type[QuantizedLayer])


def register_quantized_layer(float_class: type[nn.Module]) -> Callable[[Layer], Layer]:
    """Decorator: layers of ``float_class`` are converted to the decorated class. A class that is taken raises."""

    def register(quantized_class: Layer) -> Layer:
        if float_class in QUANTIZED_LAYERS:
            raise ValueError(f"{float_class.__name__} is already converted to {QUANTIZED_LAYERS[float_class].__name__}")
        quantized_class.float_class = float_class
        QUANTIZED_LAYERS[float_class] = quantized_class
        _quantized_class.cache_clear()
        return quantized_class

    return register


def quantized_class_of(module: Any) -> type[QuantizedLayer] | None:
    """The quantized class of a layer, of a subclass of one, or of a layer that is quantized; ``None`` for others."""
    cls: Any = type(module)
    return _quantized_class(cls)


@functools.cache
def _quantized_class(cls: Any) -> type[QuantizedLayer] | None:
    return next((quantized for base, quantized in QUANTIZED_LAYERS.items() if issubclass(cls, base)), None)
