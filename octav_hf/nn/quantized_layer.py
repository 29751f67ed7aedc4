"""Base class of quantized layers, and the registry of float classes."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeVar

from torch import nn

from .fake_quantize import FakeQuantize
from .granularity import Granularity
from .holds_frozen_clips import HoldsFrozenClips
from .weight_fake_quantize import WeightFakeQuantize


class QuantizedLayer(HoldsFrozenClips):
    """Mixin placed before a float layer's class; each operand has a quantizer ``<operand>_quantizer``.

    ``convert`` changes the class of a float layer in place: parameters, their names, hooks and references to the module
    stay as they are. The quantizer of an operand in float is ``nn.Identity``.
    """

    kind: ClassVar[str]  # in reports
    # Operand -> the config field with its bits.
    operands: ClassVar[Mapping[str, str]] = {"weight": "weight_bits", "input": "activation_bits"}
    clip_dim: ClassVar[tuple[int, ...]]  # dimensions that share a clip in the tensor that weight_quantizer gets
    weight_quantizer_class: ClassVar[type[FakeQuantize]] = WeightFakeQuantize
    weight_granularities: ClassVar[tuple[Granularity, ...]] = (Granularity.CHANNEL, Granularity.TENSOR)
    # The granularities of ACTIVATION_GRANULARITIES["input"] whose scales factor out of the layer's sums.
    input_granularities: ClassVar[tuple[Granularity, ...]] = (Granularity.TENSOR,)
    supports_asymmetric_input: ClassVar[bool] = False  # whether the offset adds only a constant per output feature
    # Key of the weight in the state dict of the other form (packed or not), and the function that converts to it.
    other_form: ClassVar[str] = "weight_quantizer.packed_data"
    other_form_by: ClassVar[str] = "pack_octav"
    float_class: ClassVar[type[nn.Module]]  # before conversion, set by register_quantized_layer

    weight_quantizer: nn.Module
    input_quantizer: nn.Module

    max_calls = 1

    @property
    def operand_quantizers(self) -> dict[str, nn.Module]:
        return {operand: getattr(self, f"{operand}_quantizer") for operand in self.operands}

    def is_covered(self, state_dict: Mapping[str, Any], prefix: str) -> bool:
        """Whether the state dict contains the weight, which may be parametrized or packed."""
        names = f"{prefix}weight", f"{prefix}weight_quantizer.packed_data"
        return any(name in state_dict for name in names) or any(
            name.startswith(f"{prefix}parametrizations.weight.") for name in state_dict
        )

    @classmethod
    def unsupported_reason(cls, layer: nn.Module) -> str:
        """Why ``layer``, of class ``float_class``, cannot be converted, and what to do; empty if it can."""
        return ""

    @classmethod
    def convert(cls, layer: nn.Module, quantizers: Mapping[str, nn.Module]) -> None:
        """Convert ``layer``, exactly of class ``float_class``, to this class in place, with quantizers by operand."""
        layer.__class__ = cls
        for operand, quantizer in quantizers.items():
            layer.add_module(f"{operand}_quantizer", quantizer.train(layer.training))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """As in ``nn.Module``; ``RuntimeError`` if the weight in ``state_dict`` has the other form, strict or not."""
        self.check_form(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def check_form(self, state_dict: Mapping[str, Any], prefix: str) -> None:
        """Raise ``RuntimeError`` if the weight in a state dict, with names below ``prefix``, has the other form."""
        stored = state_dict.get(f"{prefix}{self.other_form}")
        if stored is not None:
            raise RuntimeError(
                f"{prefix}{self.other_form} of shape {tuple(stored.shape)}: {type(self).__name__} does not store its "
                f"weight in this form; call octav_hf.{self.other_form_by}(model) before load_state_dict"
            )

    def restore(self) -> None:
        """Undo ``convert``."""
        for operand in self.operands:
            delattr(self, f"{operand}_quantizer")
        self.__class__ = self.float_class  # type: ignore[assignment]


QUANTIZED_LAYERS: dict[type[nn.Module], type[QuantizedLayer]] = {}
"""Float class -> quantized class."""

Layer = TypeVar("Layer", bound=type[QuantizedLayer])


def register_quantized_layer(float_class: type[nn.Module]) -> Callable[[Layer], Layer]:
    """Decorator: convert layers of ``float_class`` to the decorated class; ``ValueError`` if one is registered."""

    def register(quantized_class: Layer) -> Layer:
        if float_class in QUANTIZED_LAYERS:
            raise ValueError(f"{float_class.__name__} is already converted to {QUANTIZED_LAYERS[float_class].__name__}")
        quantized_class.float_class = float_class
        QUANTIZED_LAYERS[float_class] = quantized_class
        _quantized_class.cache_clear()
        return quantized_class

    return register


def quantized_class_of(module: Any) -> type[QuantizedLayer] | None:
    """The quantized class of a float layer (also of a subclass) or a quantized layer; ``None`` for other modules."""
    cls: Any = type(module)
    return _quantized_class(cls)


@functools.cache
def _quantized_class(cls: Any) -> type[QuantizedLayer] | None:
    return next((quantized for base, quantized in QUANTIZED_LAYERS.items() if issubclass(cls, base)), None)
