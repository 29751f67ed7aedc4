"""Layers whose weight is stored as packed integers and scales instead of a float parameter."""

import functools
from typing import Any, ClassVar

from torch import Tensor, nn

from .._utils.torch_private import own_parameters, set_own_parameters
from .embedding import QuantizedEmbedding
from .frozen_clips import FrozenClips
from .packed_tensor import packed_message
from .packed_weight import PackedWeight
from .quantized_layer import QuantizedLayer


class PackedLayer(QuantizedLayer):
    """Mixin placed before a quantized layer's class: ``weight`` is dequantized whenever it is read.

    ``pack`` converts an existing layer by changing its class in place. The packed weight is not a parameter; replacing
    or reparametrizing it raises ``RuntimeError``.
    """

    other_form: ClassVar[str] = "weight"
    other_form_by: ClassVar[str] = "unpack_octav"
    weight_quantizer: PackedWeight
    # ``arithmetic(layer, input)`` computes ``forward`` instead of the layer's class; set by ``octav_hf.inference``.
    arithmetic: Any = None

    def forward(self, input: Tensor) -> Tensor:
        """As in the quantized layer."""
        return super().forward(input) if self.arithmetic is None else self.arithmetic(self, input)

    @property
    def weight(self) -> Tensor:
        """The quantized weight as a ``PackedTensor``; shape, dtype and values as in the training form."""
        return self.weight_quantizer.tensor

    @staticmethod
    def pack(layer: QuantizedLayer, packed: PackedWeight) -> None:
        """Replace the parameter ``weight`` of ``layer`` with ``packed``, in place."""
        layer.weight_quantizer = packed
        base: Any = type(layer)
        layer.__class__ = _packed_class(base)
        # None keeps the weight's position among the parameters.
        parameters = own_parameters(layer) | {"weight": None}
        set_own_parameters(layer, _Parameters(parameters, packed))

    def unpack(self) -> None:
        """Undo ``pack`` in place; the parameter ``weight`` gets the dequantized values."""
        self.__dict__.pop("arithmetic", None)
        packed, quantizer = self.weight_quantizer, self.weight_quantizer_class(**self.weight_quantizer.init_kwargs)
        if packed.is_frozen:
            quantizer.freeze(FrozenClips(True, packed.compute_clip(self.weight)))
        self.__class__ = type(self).__bases__[1]
        _give_parameter(self, packed)
        self.weight_quantizer = quantizer  # type: ignore[assignment]

    def restore(self) -> None:
        """Convert to a float layer with the dequantized values, in place."""
        packed = self.weight_quantizer
        self.__dict__.pop("arithmetic", None)
        super().restore()
        _give_parameter(self, packed)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As in ``nn.Module``; ``RuntimeError`` for the weight and for the parameters of reparametrizations of it."""
        if name.partition("_")[0] == "weight":
            raise _refusal(self.weight_quantizer)
        super().register_parameter(name, param)

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        """As in ``nn.Module``; ``True`` raises ``RuntimeError`` and leaves the bias unchanged."""
        self.weight.requires_grad_(requires_grad)
        return super().requires_grad_(requires_grad)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            raise _refusal(self.weight_quantizer)
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        if name == "weight":
            raise _refusal(self.weight_quantizer)
        super().__delattr__(name)

    def __reduce__(self) -> tuple[Any, ...]:
        # The generated class cannot be imported by name, so its base is pickled.
        return _rebuild, (type(self).__bases__[1],), self.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self.arithmetic is not None:
            self.arithmetic.prepare(self)


class PackedEmbedding(PackedLayer):
    """A packed embedding; only the rows that are looked up are dequantized."""

    def forward(self, input: Tensor) -> Tensor:
        """``weight[input]``, ``[*, embedding_dim]``."""
        return self.weight_quantizer(input)


class _Parameters(dict[str, Any]):
    """A packed layer's own parameters. ``functional_call`` and ``weight_norm`` write to this dict directly."""

    def __init__(self, parameters: dict[str, Any], packed: PackedWeight):
        super().__init__(parameters)
        self._packed = packed

    def __setitem__(self, name: str, value: Any) -> None:
        if name == "weight" and value is not None:
            raise _refusal(self._packed)
        super().__setitem__(name, value)

    def __delitem__(self, name: str) -> None:
        if name == "weight":
            raise _refusal(self._packed)
        super().__delitem__(name)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Parameters, (dict(self), self._packed)


@functools.cache
def _packed_class(base: Any) -> Any:
    mixin = PackedEmbedding if issubclass(base, QuantizedEmbedding) else PackedLayer
    return type(base.__name__.replace("Quantized", "Packed"), (mixin, base), {"__module__": base.__module__})


def _rebuild(base: Any) -> nn.Module:
    cls = _packed_class(base)
    return cls.__new__(cls)


def _give_parameter(layer: nn.Module, packed: PackedWeight) -> None:
    weight = nn.Parameter(packed.dequantize(), requires_grad=packed.is_trainable)
    set_own_parameters(layer, {**own_parameters(layer), "weight": weight})


def _refusal(packed: PackedWeight) -> RuntimeError:
    return RuntimeError(packed_message(packed.name, packed.shape, "cannot be replaced"))
