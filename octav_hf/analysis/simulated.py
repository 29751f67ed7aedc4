"""Which models can be analysed."""

from torch import nn

from ..conversion.modules import is_quantized
from ..conversion.record import check_quantized, is_packed
from ..nn import PackedLayer, QuantizedAttention


def check_simulated(model: nn.Module, function: str) -> None:
    """Check the argument ``model`` of a public function; errors begin with its name, ``function``.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``.
        ValueError: it is not quantized, or ``convert_octav`` made it multiply integers.
    """
    check_quantized(model, function)
    for name, module in model.named_modules():
        if isinstance(module, PackedLayer | QuantizedAttention) and str(module.arithmetic or ""):
            raise ValueError(
                f"{function}: {name} multiplies {module.arithmetic} (convert_octav), so there are no values to compare "
                "with; analyse the model before convert_octav, or call unpack_octav(model) first"
            )


def check_has_float_weights(model: nn.Module, function: str) -> None:
    """The same, and ``ValueError`` if the model is packed."""
    check_simulated(model, function)
    if is_packed(model):
        raise ValueError(
            f"{function}: {type(model).__name__} is packed, and its float weights, the reference, are gone; analyse "
            "the model before pack_octav"
        )


def check_teacher(teacher: nn.Module | None, function: str) -> None:
    """Check the argument ``teacher`` in the same way: a float model, or ``None``."""
    if teacher is None:
        return
    if not isinstance(teacher, nn.Module):
        raise TypeError(
            f"{function} takes a teacher that is a model (an nn.Module), got {type(teacher).__name__}; load it first, "
            "such as by AutoModelForQuestionAnswering.from_pretrained"
        )
    if is_quantized(teacher):
        raise ValueError(
            f"{function}: the teacher, a {type(teacher).__name__}, is quantized; pass the float model, or leave it out "
            "to compare with the model itself with every quantizer off"
        )
