"""Check that ``module_overrides`` concern operands of the modules that they are for."""

from collections.abc import Collection, Sequence
from typing import Any

from torch import nn

from .._utils.name_patterns import NamePatterns
from ..nn import ATTENTION_OPERANDS, quantized_class_of
from .attention_modules import attention_modules
from .layers import unknown_weights
from .request import Request

_ACTIVATIONS = ("input", *ATTENTION_OPERANDS)
_OPERANDS_OF: dict[str, Sequence[str]] = {
    "weight_bits": ("weight",),
    "activation_bits": _ACTIVATIONS,
    "embedding_bits": ("embedding",),
    "weight_clip": ("weight", "embedding"),
    "activation_clip": _ACTIVATIONS,
    "weight_clip_options": ("weight", "embedding"),
    "activation_clip_options": _ACTIVATIONS,
    "weight_granularity": ("weight", "embedding"),
    "weight_gradient_estimator": ("weight", "embedding"),
    "activation_gradient_estimator": _ACTIVATIONS,
    "unsigned_activations": ("input",),
    "asymmetric_activations": ("input",),
    "quantize_attention": ATTENTION_OPERANDS,
}
"""Field -> operands that it can change; embedding stands for the weight of an embedding."""


def check_overrides_apply(request: Request) -> None:
    """Raise ``ValueError`` for an override whose fields concern no operand of the modules that its pattern matches.

    One field of several may concern none: one override can be for modules of several kinds.
    """
    overrides = request.config.module_overrides
    if not overrides:
        return
    attention = attention_modules(request.modules, request.config.attention_modules)
    for pattern, names in NamePatterns(overrides).by_pattern(request.modules).items():
        found = {operand for name in names for operand in _operands(request.modules[name], name in attention)}
        concerned = {operand for field, value in overrides[pattern].items() for operand in _concerned(field, value)}
        if concerned and found.isdisjoint(concerned):
            raise ValueError(
                f"module_overrides[{pattern!r}] has no effect: {', '.join(overrides[pattern])} of modules without "
                f"{', '.join(sorted(concerned))} to quantize; remove it, or name other modules"
            )


def _concerned(field: str, value: Any) -> Sequence[str]:
    return tuple(value) if field == "activation_granularity" else _OPERANDS_OF.get(field, ())


def _operands(module: nn.Module, is_attention: bool) -> Collection[str]:
    layer = quantized_class_of(module)
    if layer is not None:
        return ("embedding",) if "embedding_bits" in layer.operands.values() else layer.operands
    operands = ATTENTION_OPERANDS if is_attention else ()
    # Bits of None also leave a module in float that would be refused.
    return (*operands, "weight", "input") if unknown_weights(module) else operands
