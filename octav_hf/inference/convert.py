"""``convert_octav``: a model that multiplies integers."""

from typing import TypeVar

from torch import nn
from transformers.pytorch_utils import Conv1D

from ..conversion.modules import check_no_groups
from ..conversion.record import check_quantized, is_packed
from ..nn import FakeQuantize, PackedLayer, QuantizedAttention, QuantizedConvolution, QuantizedLinear
from ..packing.pack import pack_octav
from .integer_attention import IntegerAttentionArithmetic
from .integer_layer import IntegerArithmetic

Model = TypeVar("Model", bound=nn.Module)


def convert_octav(model: Model, *, reference: bool = False) -> Model:
    """Make a quantized model multiply integers, in place, for inference.

    A model that is not packed is packed first, by ``pack_octav``. Then each packed layer multiplies the integers of its
    input by those of its weight and scales the sums, which are exact, where the packed model multiplies dequantized
    values in floating point. The outputs agree up to the rounding of floats, which may move a value of a later layer
    across the boundary between two integers. Dynamic clips are computed as before.

    What is saved is the packed form. ``unpack_octav`` and ``remove_octav`` undo it; so does loading a saved model.

    Args:
        model: quantized by ``apply_octav``, or loaded.
        reference: compute the same products in float64, which is slow, to compare with. Calling the function again
            switches.

    Returns:
        ``model``.

    Raises:
        TypeError, ValueError: as ``pack_octav``.
        NotImplementedError: an operand has clips for groups. The model is then unchanged.
    """
    check_quantized(model, "convert_octav")
    check_no_groups(model, "convert_octav")
    if not is_packed(model):
        pack_octav(model)
    for module in model.modules():
        if isinstance(module, PackedLayer) and _has_product(module):
            module.arithmetic = IntegerArithmetic(module, reference)
        elif isinstance(module, QuantizedAttention) and _has_codes(*module.operand_quantizers.values()):
            module.arithmetic = IntegerAttentionArithmetic(reference)
    return model


def _has_product(layer: PackedLayer) -> bool:
    """Whether this is a layer of a kind that can multiply integers, with a quantized input."""
    of_known_kind = isinstance(layer, QuantizedLinear | QuantizedConvolution) or layer.float_class is Conv1D
    return of_known_kind and _has_codes(layer.input_quantizer)


def _has_codes(*quantizers: nn.Module) -> bool:
    return all(isinstance(quantizer, FakeQuantize) for quantizer in quantizers)
