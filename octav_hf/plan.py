"""Deciding which module gets which quantizers, with every check that could fail, before anything is changed."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from .config import OctavConfig, matches
from .nn import ATTENTION_OPERANDS, FakeQuantize, QuantizedAttention, QuantizedLinear, WeightFakeQuantize

# Attention implementations whose matmuls run as functions that can be seen; None: the module does not ask for one.
_REACHABLE_IMPLEMENTATIONS = ("eager", "sdpa", None)


@dataclass(frozen=True)
class Conversion:
    """One module to convert, and its quantizers by operand (``nn.Identity`` for an operand left in float)."""

    name: str
    module: nn.Module
    quantizers: dict[str, nn.Module]

    def apply(self) -> None:
        """Convert the module in place."""
        if isinstance(self.module, nn.Linear):
            QuantizedLinear.convert(self.module, self.quantizers["weight"], self.quantizers["input"])
        else:
            QuantizedAttention.convert(self.module, nn.ModuleDict(self.quantizers), self.name)


def plan_conversion(model: nn.Module, config: OctavConfig) -> list[Conversion]:
    """The conversions that ``config`` asks of a float ``model``; changes nothing.

    Raises:
        ValueError: the model cannot be quantized as asked; the message names the module and what to write instead.
    """
    config.validate()
    _check_patterns(model, config)
    if not any(isinstance(module, nn.Linear) for module in model.modules()):
        raise ValueError(f"{type(model).__name__} has no nn.Linear layer, so there is nothing to quantize")
    plan = [*_plan_attention(model, config), *plan_linear_layers(model, config)]
    if not plan:
        raise ValueError("the config leaves every linear layer and attention matmul in float; exclude less")
    for conversion in plan:
        if "forward" in conversion.module.__dict__:
            raise ValueError(
                f"{conversion.name}: the forward of this {type(conversion.module).__name__} has been replaced on the "
                "object (by a device_map, or another library), so a quantized one would never run; pass "
                "quantization_config=OctavConfig(…) to from_pretrained, or call apply_octav first"
            )
    return plan


def plan_linear_layers(model: nn.Module, config: OctavConfig) -> Iterator[Conversion]:
    """The conversions of the linear layers that are not quantized yet."""
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or isinstance(module, QuantizedLinear) or config.excluded_by(name):
            continue
        settings = config.settings_for(name)
        if settings.weight_bits is None and settings.activation_bits is None:
            continue
        if type(module) is not nn.Linear:
            raise ValueError(
                f"{name}: {type(module).__name__} with weight of shape {tuple(module.weight.shape)} is a subclass of "
                "nn.Linear that may compute something else; name it in exclude_modules to leave it in float"
            )
        quantizers = {"weight": _weight_quantizer(config, name), "input": _activation_quantizer(config, name, "input")}
        yield Conversion(name, module, quantizers)


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
                operand: _activation_quantizer(config, name, operand, signed=operand != "probabilities")
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


def _weight_quantizer(config: OctavConfig, name: str) -> nn.Module:
    settings = config.settings_for(name)
    if settings.weight_bits is None:
        return nn.Identity()
    return WeightFakeQuantize(
        settings.weight_bits,
        clip=settings.weight_clip,
        clip_options=settings.weight_clip_options,
        gradient=settings.weight_gradient,
        dim=1,  # one clip per output feature (Appendix E.2)
        name=f"{name} weight",
    )


def _activation_quantizer(config: OctavConfig, name: str, operand: str, signed: bool = True) -> nn.Module:
    settings = config.settings_for(name)
    if settings.activation_bits is None:
        return nn.Identity()
    return FakeQuantize(
        settings.activation_bits,
        clip=settings.activation_clip,
        clip_options=settings.activation_clip_options,
        gradient=settings.activation_gradient,
        signed=signed,
        name=f"{name} {operand}",
    )
