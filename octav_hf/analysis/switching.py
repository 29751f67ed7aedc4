"""Turning quantizers off temporarily."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager

from torch import nn

from ..conversion.modules import operand_quantizers
from .simulated import check_has_float_weights


@contextmanager
def in_float(
    model: nn.Module, quantizers: Collection[nn.Module] | None = None, but: Collection[nn.Module] = ()
) -> Iterator[None]:
    """Context in which some operands are not quantized.

    Each of their quantizers is replaced by an ``nn.Identity``, as for an operand that the config leaves in float, and
    put back afterwards.

    Args:
        model: quantized by ``apply_octav``, and neither packed nor converted to integer arithmetic.
        quantizers: the model's quantizers to turn off, such as ``layer.weight_quantizer``; ``None``: all.
        but: quantizers that stay on.

    Raises:
        ValueError: the model is not quantized, or is packed or converted.
    """
    check_has_float_weights(model, "in_float")
    switched = [
        each
        for each in operand_quantizers(model)
        if (quantizers is None or each[2] in quantizers) and each[2] not in but
    ]
    try:
        for module, operand, quantizer in switched:
            setattr(model.get_submodule(module), f"{operand}_quantizer", nn.Identity().train(quantizer.training))
        yield
    finally:
        for module, operand, quantizer in switched:
            setattr(model.get_submodule(module), f"{operand}_quantizer", quantizer)
