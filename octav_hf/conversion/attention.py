"""Deciding which attention module gets quantizers, with every check that could fail."""

from collections.abc import Iterator

from torch import nn

from .._utils.transformers_compat import attn_implementation
from ..config import OctavConfig
from ..nn import ATTENTION_OPERANDS
from .attention_modules import attention_modules
from .layers import Conversion, activation_quantizer

# Attention implementations whose matmuls run as functions that can be seen; None: the module does not ask for one.
_REACHABLE_IMPLEMENTATIONS = ("eager", "sdpa", None)


def plan_attention(model: nn.Module, config: OctavConfig) -> Iterator[Conversion]:
    """The conversions of the attention modules.

    Raises:
        ValueError: the matmuls of one cannot be reached; the message names it and what to write instead.
    """
    found = False
    for name, module in attention_modules(model):
        found = True
        settings = config.settings_for(name)
        if config.excluded_by(name) or not settings.quantize_attention or settings.activation_bits is None:
            continue
        _check_reachable(model, name, module)
        yield Conversion(
            name,
            module,
            {
                operand: activation_quantizer(
                    config,
                    settings.activation_bits,
                    name,
                    operand,
                    signed=operand != "probabilities",
                    granularity=settings.granularity(operand),
                )
                for operand in ATTENTION_OPERANDS
            },
        )
    heads = getattr(getattr(model, "config", None), "num_attention_heads", None)
    if heads and not found and config.quantize_attention and config.activation_bits is not None:
        raise ValueError(
            f"{type(model).__name__} has {heads} attention heads but no module whose class is called …Attention… or "
            "whose code is attention, so its attention matmuls cannot be reached; set quantize_attention=False to leave"
            " them in float"
        )


def _check_reachable(model: nn.Module, name: str, module: nn.Module) -> None:
    remedy = "or set quantize_attention=False to leave the attention matmuls in float"
    if isinstance(module, nn.MultiheadAttention):
        raise ValueError(f"{name}: nn.MultiheadAttention fuses its matmuls; name it in exclude_modules")
    module_config = getattr(module, "config", getattr(model, "config", None))
    implementation = attn_implementation(module_config)
    if implementation not in _REACHABLE_IMPLEMENTATIONS:
        raise ValueError(
            f"{name}: attn_implementation {implementation!r} hides the matmuls of this {type(module).__name__} in a "
            f"kernel of its own; load the model with attn_implementation='sdpa' or 'eager', {remedy}"
        )
