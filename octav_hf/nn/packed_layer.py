"""Layers with packed weights: integers and scales instead of a float parameter."""

import functools
from typing import Any

from torch import Tensor, nn

from .embedding import QuantizedEmbedding
from .frozen_clips import FrozenClips
from .packed_weight import PackedWeight
from .quantized_layer import QuantizedLayer


class PackedLayer(QuantizedLayer):
    """Mixin in front of a quantized layer's class: ``weight`` is dequantized whenever it is read.

    ``pack`` makes one from an existing layer by changing its class in place. The packed weight is not a parameter.
    """

    weight_quantizer: PackedWeight

    @property
    def weight(self) -> Tensor:
        """The weight on its grid; shape, dtype and values as in the training form."""
        return self.weight_quantizer.dequantize()

    @staticmethod
    def pack(layer: QuantizedLayer, packed: PackedWeight) -> None:
        """Replace the parameter ``weight`` of ``layer`` by ``packed``, in place."""
        layer.register_parameter("weight", None)  # keeps its position among the parameters
        layer.weight_quantizer = packed
        base: Any = type(layer)
        layer.__class__ = _packed_class(base)

    def unpack(self) -> None:
        """Undo ``pack`` in place; the parameter ``weight`` gets the packed values."""
        weight, quantizer = self.weight, self.weight_quantizer_class(**self.weight_quantizer.init_kwargs)
        if self.weight_quantizer.is_frozen:
            quantizer.freeze(FrozenClips(True, self.weight_quantizer.compute_clip(weight)))
        self.__class__ = type(self).__bases__[1]
        self.weight_quantizer = quantizer  # type: ignore[assignment]
        self.weight = nn.Parameter(weight)  # type: ignore[misc]

    def restore(self) -> None:
        """Convert to a float layer with the packed values, in place."""
        weight = self.weight
        super().restore()
        self.weight = nn.Parameter(weight)  # type: ignore[misc]

    def __reduce__(self) -> tuple[Any, ...]:
        # The generated class cannot be imported by name, so its base is pickled.
        return _rebuild, (type(self).__bases__[1],), self.__dict__


class PackedEmbedding(PackedLayer):
    """A packed embedding; only the rows that are looked up are dequantized."""

    def forward(self, input: Tensor) -> Tensor:
        """``weight[input]``, ``[*, embedding_dim]``."""
        return self.weight_quantizer(self.weight_quantizer.dequantize_rows(input))


@functools.cache
def _packed_class(base: Any) -> Any:
    mixin = PackedEmbedding if issubclass(base, QuantizedEmbedding) else PackedLayer
    return type(base.__name__.replace("Quantized", "Packed"), (mixin, base), {"__module__": base.__module__})


def _rebuild(base: Any) -> nn.Module:
    cls = _packed_class(base)
    return cls.__new__(cls)
