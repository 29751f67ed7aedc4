"""Deciding which module gets which quantizers, with every check that could fail, before anything is changed."""

from collections.abc import Iterator

from torch import nn

from .config import OctavConfig, matches
from .nn import ATTENTION_OPERANDS, QUANTIZED_LAYERS, quantized_class_of
from .plan_layers import Conversion, activation_quantizer, plan_layers

# Attention implementations whose matmuls run as functions that can be seen; None: the module does not ask for one.
_REACHABLE_IMPLEMENTATIONS = ("eager", "sdpa", None)


def plan_conversion(model: nn.Module, config: OctavConfig) -> list[Conversion]:
    """The conversions that ``config`` asks of a float ``model``; changes nothing.

    Raises:
        ValueError: the model cannot be quantized as asked; the message names the module and what to write instead.
    """
    config.validate()
    _check_patterns(model, config)
    if not any(quantized_class_of(module) for module in model.modules()):
        kinds = ", ".join(f"nn.{float_class.__name__}" for float_class in QUANTIZED_LAYERS)
        raise ValueError(f"{type(model).__name__} has no layer that can be quantized ({kinds})")
    plan = [*_plan_attention(model, config), *plan_layers(model, config)]
    if not plan:
        raise ValueError("the config leaves every layer and attention matmul in float; exclude less")
    for conversion in plan:
        if "forward" in conversion.module.__dict__:
            raise ValueError(
                f"{conversion.name}: the forward of this {type(conversion.module).__name__} has been replaced on the "
                "object (by a device_map, or another library), so a quantized one would never run; pass "
                "quantization_config=OctavConfig(…) to from_pretrained, or call apply_octav first"
            )
    return plan


def attention_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Name and module of those that compute attention: called so by their class, with no other such module inside."""
    for name, module in model.named_modules():
        inner = (child for child in module.modules() if child is not module)
        if _is_attention(module) and not any(_is_attention(child) for child in inner):
            yield name, module


def _is_attention(module: nn.Module) -> bool:
    return "Attention" in type(module).__name__ and any(True for _ in module.children())


def _plan_attention(model: nn.Module, config: OctavConfig) -> Iterator[Conversion]:
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
                    settings, settings.activation_bits, name, operand, signed=operand != "probabilities"
                )
                for operand in ATTENTION_OPERANDS
            },
        )
    heads = getattr(getattr(model, "config", None), "num_attention_heads", None)
    if heads and not found and config.quantize_attention and config.activation_bits is not None:
        raise ValueError(
            f"{type(model).__name__} has {heads} attention heads but no module whose class is called …Attention…, so "
            "its attention matmuls cannot be reached; set quantize_attention=False to leave them in float"
        )


def _check_reachable(model: nn.Module, name: str, module: nn.Module) -> None:
    remedy = "or set quantize_attention=False to leave the attention matmuls in float"
    if isinstance(module, nn.MultiheadAttention):
        raise ValueError(f"{name}: nn.MultiheadAttention fuses its matmuls; name it in exclude_modules")
    module_config = getattr(module, "config", getattr(model, "config", None))
    implementation = getattr(module_config, "_attn_implementation", None)
    if implementation not in _REACHABLE_IMPLEMENTATIONS:
        raise ValueError(
            f"{name}: attn_implementation {implementation!r} hides the matmuls of this {type(module).__name__} in a "
            f"kernel of its own; load the model with attn_implementation='sdpa' or 'eager', {remedy}"
        )


def _check_patterns(model: nn.Module, config: OctavConfig) -> None:
    names = [name for name, _ in model.named_modules() if name]
    for field, patterns in (("exclude_modules", config.exclude_modules), ("module_overrides", config.module_overrides)):
        for pattern in patterns:
            if not any(matches(pattern, name) for name in names):
                raise ValueError(
                    f"{field}: {pattern!r} matches no module of {type(model).__name__}; write a full dotted name, or a "
                    "pattern for it: print([name for name, _ in model.named_modules()]) lists them"
                )
