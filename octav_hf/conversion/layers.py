"""Plan the conversion of layers with a weight, whose classes are registered in ``nn``."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from .._utils.torch_private import own_parameters
from ..config import OctavConfig
from ..nn import FakeQuantize, QuantizedLayer, WeightFakeQuantize, quantized_class_of
from ..nn.granularity import Granularity
from .operands import activation_quantizer, weight_quantizer
from .request import ModulePlan, Request, prefix, to_exclude, to_set

_NORMS = (nn.LayerNorm, nn.RMSNorm)


def plan_layers(request: Request) -> Iterator[ModulePlan]:
    """The plans of the layers with a weight that are not quantized yet.

    Raises:
        ValueError: a layer cannot be quantized; the message names it and tells what to write instead.
    """
    for name, module in request.modules.items():
        if isinstance(module, QuantizedLayer) or name in request.left_out:
            continue
        layer_class, settings = quantized_class_of(module), request.settings[name]
        if layer_class is None:
            continue
        bits = {operand: getattr(settings, field) for operand, field in layer_class.operands.items()}
        if name in request.edges:
            bits = _first_last_bits(bits, name, request.config)
        if any(bits.values()):
            yield _plan_layer(request, name, module, layer_class, bits)


def left_in_float(request: Request) -> dict[str, list[str]]:
    """Modules of unregistered classes -> names of their parameters that may be weights, such as those of experts.

    Raises:
        ValueError: the name of such a parameter contains ``weight``; the message names the module and tells what to
            write instead.
    """
    found = {}
    for name, module in request.modules.items():
        if name in request.left_out or quantized_class_of(module) is not None:
            continue
        settings = request.settings[name]
        names = unknown_weights(module)
        if names and (settings.weight_bits or settings.activation_bits):
            weight = next((parameter for parameter in names if "weight" in parameter), None)
            if weight is not None:
                shape = tuple(module.get_parameter(weight).shape)
                raise ValueError(
                    f"{prefix(name)}{type(module).__name__} with {weight} of shape {shape} is not a layer that can be "
                    f"quantized; {to_exclude(name)} to leave it in float"
                )
            found[name] = names
    return found


def unknown_weights(module: nn.Module) -> list[str]:
    """Names of the parameters that a module of an unregistered class may use in a matmul.

    These are floating-point parameters with two or more dimensions (weights of experts have three), except those of
    norms, which multiply elementwise, learned clips, and those named bias. Some of them, such as position embeddings,
    are only added.
    """
    if isinstance(module, (*_NORMS, FakeQuantize)):
        return []
    return [
        name
        for name, value in own_parameters(module).items()
        if value is not None and value.dim() > 1 and value.is_floating_point()
        if "weight" in name or "bias" not in name
    ]


def running_module(name: str, modules: Mapping[str, nn.Module]) -> str:
    """The innermost module with a forward among this module and its ancestors; ``nn.ParameterList`` has no forward."""
    while name and type(modules[name]).forward is nn.Module.forward:
        name = name.rpartition(".")[0]
    return name


def _plan_layer(
    request: Request, name: str, module: nn.Module, layer_class: type[QuantizedLayer], bits: dict[str, int | None]
) -> ModulePlan:
    settings = request.settings[name]
    _check_convertible(name, module, layer_class)
    override = request.config.module_overrides.get(name, {})
    weight_granularity = settings.weight_granularity
    if weight_granularity not in layer_class.weight_granularities:
        # A general setting for groups applies to the layers that support them.
        if weight_granularity != Granularity.GROUP or "weight_granularity" in override:
            raise ValueError(
                f"{prefix(name)}the weight of {type(module).__name__} has one clip per channel (row), not per "
                f"{weight_granularity}; write {to_set(name, 'weight_granularity', 'channel')}"
            )
        weight_granularity = Granularity.CHANNEL
    quantizers = {"weight": weight_quantizer(request, name, bits["weight"], layer_class, weight_granularity)}
    if "input" in bits:
        _check_override(override, name, module, layer_class)
        granularity = settings.granularity("input")
        quantizers["input"] = activation_quantizer(
            request,
            name,
            "input",
            bits["input"],
            signed=None if settings.unsigned_activations else True,
            # General settings apply to the layers that support them.
            asymmetric=settings.asymmetric_activations and layer_class.supports_asymmetric_input,
            granularity=granularity if granularity in layer_class.input_granularities else Granularity.TENSOR,
        )
    can_freeze = issubclass(layer_class.weight_quantizer_class, WeightFakeQuantize)
    return ModulePlan(name, module, layer_class, quantizers, can_freeze and settings.frozen_weight_clips)


def _check_override(
    override: Mapping[str, Any], name: str, module: nn.Module, layer_class: type[QuantizedLayer]
) -> None:
    """Raise ``ValueError`` if an override for exactly this layer sets something that its input does not support."""
    granularity = override.get("activation_granularity", {}).get("input", Granularity.TENSOR)
    if granularity not in layer_class.input_granularities:
        raise ValueError(
            f"{prefix(name)}the input of this {type(module).__name__} has one clip per tensor, not per {granularity}: "
            "the layer sums over positions, so the scale of a position does not factor out; write "
            f"{to_set(name, 'activation_granularity', {'input': 'tensor'})}, or leave it out"
        )
    if override.get("asymmetric_activations") and not layer_class.supports_asymmetric_input:
        raise ValueError(
            f"{prefix(name)}the input of this {type(module).__name__} cannot be asymmetric, because padding zeros have "
            f"no offset; remove asymmetric_activations from module_overrides[{name!r}]"
        )


def _first_last_bits(bits: dict[str, int | None], name: str, config: OctavConfig) -> dict[str, int | None]:
    """Replace the bits of each quantized operand with ``first_last_bits``."""
    if not any(bits.values()):
        raise ValueError(
            f"first_last_bits={config.first_last_bits} has no effect on {name}, whose weight_bits and activation_bits "
            "are None; set one of them, or first_last_bits=None"
        )
    return {operand: number and config.first_last_bits for operand, number in bits.items()}


def _check_convertible(name: str, module: nn.Module, quantized_class: type[QuantizedLayer]) -> None:
    float_class = quantized_class.float_class
    remedy = f"{to_exclude(name)} to leave it in float"
    described = type(module).__name__
    weight = own_parameters(module).get("weight")
    if weight is not None:
        described += f" with weight of shape {tuple(weight.shape)}"
    if type(module) is not float_class:
        raise ValueError(
            f"{prefix(name)}{described} is a subclass of nn.{float_class.__name__} and may compute something else; "
            f"{remedy}"
        )
    reason = quantized_class.unsupported_reason(module)
    if reason:
        raise ValueError(f"{prefix(name)}{described} cannot be quantized: {reason}, or {remedy}")
