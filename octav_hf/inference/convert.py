"""``convert_octav``: integer matmuls for inference."""

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
    """Convert a quantized model to integer matmuls, in place, for inference.

    A model that is not packed is first packed by ``pack_octav``. Each packed layer then multiplies the integers of its
    input and weight, with exact sums, and scales the result; the packed model multiplies dequantized values in floating
    point. The outputs agree up to floating-point rounding, which may move a value in a later layer to a neighbouring
    integer. Dynamic clips are computed as before.

    ``save_pretrained`` saves the packed form. ``unpack_octav`` and ``remove_octav`` undo the conversion, and a loaded
    model is not converted.

    Args:
        model: quantized by ``apply_octav``, or loaded.
        reference: compute the same matmuls in float64, which is slow, as a reference. Another call with
            ``reference=False`` switches back.

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
    """Whether integer matmuls support this layer, and its input is quantized."""
    of_known_kind = isinstance(layer, QuantizedLinear | QuantizedConvolution) or layer.float_class is Conv1D
    return of_known_kind and _has_codes(layer.input_quantizer)


def _has_codes(*quantizers: nn.Module) -> bool:
    return all(isinstance(quantizer, FakeQuantize) for quantizer in quantizers)
