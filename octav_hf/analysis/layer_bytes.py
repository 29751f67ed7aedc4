"""The bytes of each module's parameters in the packed model."""

from dataclasses import dataclass

from torch import nn

from .._utils.torch_private import own_parameters
from ..conversion.modules import shared_weights
from ..nn import PackedWeight, QuantizedLayer
from ..packing.pack import packed_layers, quantized_weights


@dataclass(frozen=True)
class LayerBytes:
    """The parameters of one module, without those of the modules inside it.

    Attributes:
        kind: ``"linear"``, ``"convolution"``, ``"embedding"``, or the class of another module.
        bits: of the stored weight; ``None`` if it is stored in floating point.
        bytes: of the integers, their scales, and what stays in floating point in its own dtype, such as the bias.
        float32_bytes: of as many values in float32.
    """

    module: str
    kind: str
    bits: int | None
    bytes: int
    float32_bytes: int


def layer_bytes(model: nn.Module) -> list[LayerBytes]:
    """The bytes that each module with parameters has in the packed form, in the model's order.

    A weight that several modules share is stored in floating point, as by ``pack_octav``, and counted for the first.

    Args:
        model: quantized, packed or not. The values of its weights are not read.
    """
    packed = _packed_weights(model)
    counted: set[int] = set()
    layers = []
    for name, module in model.named_modules():
        size, numel, bits = 0, 0, None
        if module in packed:
            weight = packed[module]
            size, numel, bits = weight.packed_data.nbytes + weight.scale.nbytes, weight.shape.numel(), weight.num_bits
        for parameter_name, parameter in own_parameters(module).items():
            is_packed = module in packed and parameter_name == "weight"
            if parameter is None or is_packed or id(parameter) in counted or isinstance(module, PackedWeight):
                continue
            counted.add(id(parameter))
            size, numel = size + parameter.nbytes, numel + parameter.numel()
        if numel:
            kind = module.kind if isinstance(module, QuantizedLayer) else type(module).__name__
            layers.append(LayerBytes(name, kind, bits, size, 4 * numel))
    return layers


def _packed_weights(model: nn.Module) -> dict[nn.Module, PackedWeight]:
    """The packed weight of each layer that has one, or would have; then without values, on the meta device."""
    shared = shared_weights(model)
    packed: dict[nn.Module, PackedWeight] = {
        layer: PackedWeight(quantizer, layer.weight, is_frozen=False)
        for layer, quantizer in quantized_weights(model).values()
        if layer not in shared and "weight" in own_parameters(layer)
    }
    return packed | {layer: layer.weight_quantizer for layer in packed_layers(model).values()}
