"""Deciding which module gets which quantizers, with every check that could fail, before anything is changed."""

from torch import nn

from ..config import OctavConfig, matches
from ..nn import QUANTIZED_LAYERS, FakeQuantize, quantized_class_of
from .attention import plan_attention
from .layers import Conversion, plan_layers


def plan_conversion(model: nn.Module, config: OctavConfig) -> list[Conversion]:
    """The conversions that ``config`` asks of a float ``model``; changes nothing.

    Raises:
        ValueError: the model cannot be quantized as asked; the message names the module and what to write instead.
    """
    config.validate()
    _check_patterns(model, config)
    if not any(quantized_class_of(module) for module in model.modules()):
        kinds = ", ".join(float_class.__name__ for float_class in QUANTIZED_LAYERS)
        raise ValueError(f"{type(model).__name__} has no layer that can be quantized ({kinds})")
    plan = [*plan_attention(model, config), *plan_layers(model, config)]
    if not plan:
        raise ValueError("the config leaves every layer and attention matmul in float; exclude less")
    for conversion in plan:
        if "forward" in conversion.module.__dict__:
            raise ValueError(
                f"{conversion.name}: the forward of this {type(conversion.module).__name__} has been replaced on the "
                "object (by a device_map, or another library), so a quantized one would never run; pass "
                "quantization_config=OctavConfig(…) to from_pretrained, or call apply_octav first"
            )
    _check_activation_clips(model, config, plan)
    return plan


def _check_patterns(model: nn.Module, config: OctavConfig) -> None:
    names = [name for name, _ in model.named_modules() if name]
    for field, patterns in (("exclude_modules", config.exclude_modules), ("module_overrides", config.module_overrides)):
        for pattern in patterns:
            if not any(matches(pattern, name) for name in names):
                raise ValueError(
                    f"{field}: {pattern!r} matches no module of {type(model).__name__}; write a full dotted name, or a "
                    "pattern for it: print([name for name, _ in model.named_modules()]) lists them"
                )


def _check_activation_clips(model: nn.Module, config: OctavConfig, plan: list[Conversion]) -> None:
    quantizers = {(conversion.name, operand): q for conversion in plan for operand, q in conversion.quantizers.items()}
    for name, operands in config.activation_clips.items():
        for operand in operands:
            if not isinstance(quantizers.get((name, operand)), FakeQuantize):
                raise ValueError(
                    f"activation_clips: {name!r} {operand!r} is no quantized activation of {type(model).__name__}; the "
                    "clips are of another model or config: set activation_clips={} and call calibrate_octav on this one"
                )
