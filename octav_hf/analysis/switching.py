"""Turning the quantizers of some modules off for a while."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager

from torch import nn

from ..conversion.modules import operand_quantizers
from .simulated import check_has_float_weights


@contextmanager
def in_float(
    model: nn.Module, modules: Collection[str] | None = None, but: Collection[nn.Module] = ()
) -> Iterator[None]:
    """Context in which the operands of some quantized modules are not quantized.

    Each of their quantizers is replaced by an ``nn.Identity``, as for an operand that the config leaves in float, and
    put back afterwards.

    Args:
        model: quantized by ``apply_octav``, and neither packed nor converted to multiply integers.
        modules: full names; ``None``: all that are quantized.
        but: quantizers, such as ``layer.weight_quantizer``, that stay on.

    Raises:
        ValueError: the model is none of these, or has no quantized module of such a name.
    """
    check_has_float_weights(model, "in_float")
    found = list(operand_quantizers(model))
    unknown = set(modules or ()) - {module for module, _, _ in found}
    if unknown:
        raise ValueError(
            f"in_float: {type(model).__name__} has no quantized module {', '.join(map(repr, sorted(unknown)))}; "
            "print(octav_hf.coverage_report(model)) lists those that it has"
        )
    switched = [each for each in found if (modules is None or each[0] in modules) and each[2] not in but]
    try:
        for module, operand, quantizer in switched:
            setattr(model.get_submodule(module), f"{operand}_quantizer", nn.Identity().train(quantizer.training))
        yield
    finally:
        for module, operand, quantizer in switched:
            setattr(model.get_submodule(module), f"{operand}_quantizer", quantizer)
