"""Deciding which layer with a weight gets which quantizers; the layers are those registered in ``nn``."""

from collections.abc import Collection, Iterator, Mapping

from torch import nn

from ..config import ModuleSettings, OctavConfig
from ..nn import QuantizedLayer, quantized_class_of
from ..nn.granularity import Granularity
from .first_last import first_and_last
from .module_plan import ModulePlan
from .operands import activation_quantizer, weight_quantizer

# A norm multiplies element by element, whatever the shape of its weight.
_NORMS = (nn.LayerNorm, nn.RMSNorm)


def plan_layers(
    model: nn.Module,
    config: OctavConfig,
    modules: Mapping[str, nn.Module],
    settings: Mapping[str, ModuleSettings],
    left_out: Collection[str],
) -> Iterator[ModulePlan]:
    """The plans of the layers with a weight that are not quantized yet.

    Args:
        model: for ``first_last_bits``.
        config: what is asked.
        modules: full name -> module, all of them.
        settings: full name -> settings, of the same.
        left_out: the names that ``exclude_modules`` and ``target_modules`` leave in float.

    Raises:
        ValueError: a layer cannot be quantized; the message names it and what to write instead.
    """
    edges = () if config.first_last_bits is None else first_and_last(model, config)
    for name, module in modules.items():
        if isinstance(module, QuantizedLayer) or name in left_out:
            continue
        quantized_class = quantized_class_of(module)
        if quantized_class is not None:
            plan = _plan_layer(name, module, quantized_class, config, settings[name], is_edge=name in edges)
            if plan is not None:
                yield plan
        elif settings[name].weight_bits or settings[name].activation_bits:
            _check_holds_no_weight(name, module)


def unknown_weights(module: nn.Module) -> list[str]:
    """Names of the weights of two or more dimensions in a module that is no registered layer and no norm."""
    if quantized_class_of(module) is not None or isinstance(module, _NORMS):
        return []
    parameters = module._parameters.items()
    return [name for name, value in parameters if "weight" in name and value is not None and value.dim() > 1]


def _plan_layer(
    name: str,
    module: nn.Module,
    quantized_class: type[QuantizedLayer],
    config: OctavConfig,
    settings: ModuleSettings,
    is_edge: bool,
) -> ModulePlan | None:
    bits = {operand: getattr(settings, field) for operand, field in quantized_class.operands.items()}
    if is_edge:
        bits = _first_last_bits(bits, name, config)
    if not any(bits.values()):
        return None
    _check_convertible(name, module, quantized_class)
    if settings.weight_granularity not in quantized_class.weight_granularities:
        raise ValueError(
            f"{name}: the weight of {type(module).__name__} has one clip per channel (row), not per "
            f"{settings.weight_granularity}; write module_overrides={{{name!r}: {{'weight_granularity': 'channel'}}}}"
        )
    quantizers = {"weight": weight_quantizer(settings, bits["weight"], name, quantized_class)}
    if "input" in bits:
        quantizers["input"] = activation_quantizer(
            config,
            settings,
            bits["input"],
            name,
            "input",
            signed=None if settings.unsigned_activations else True,
            asymmetric=_is_asymmetric(name, module, quantized_class, config, settings),
            granularity=_input_granularity(name, module, quantized_class, config, settings),
        )
    return ModulePlan(name, module, quantized_class, quantizers)


def _input_granularity(
    name: str, module: nn.Module, quantized_class: type[QuantizedLayer], config: OctavConfig, settings: ModuleSettings
) -> str:
    """What one clip of this layer's input is for; the tensor for a convolution, whatever linear layers have.

    Raises:
        ValueError: the config asks this very layer for another one.
    """
    granularity = settings.granularity("input")
    if granularity in quantized_class.input_granularities:
        return granularity
    if config.module_overrides.get(name, {}).get("activation_granularity", {}).get("input") == granularity:
        raise ValueError(
            f"{name}: the input of this {type(module).__name__} has one clip per tensor, not per {granularity}: the "
            "layer sums over positions, so the scale of one does not factor out; write "
            f"module_overrides={{{name!r}: {{'activation_granularity': {{'input': 'tensor'}}}}}}, or leave it out"
        )
    return Granularity.TENSOR


def _is_asymmetric(
    name: str, module: nn.Module, quantized_class: type[QuantizedLayer], config: OctavConfig, settings: ModuleSettings
) -> bool:
    """Whether the grid of this layer's input may be asymmetric; not for a convolution, whatever linear layers have.

    Raises:
        ValueError: the config asks it of this very layer.
    """
    if quantized_class.supports_asymmetric_input:
        return settings.asymmetric_activations
    if config.module_overrides.get(name, {}).get("asymmetric_activations"):
        raise ValueError(
            f"{name}: the input of this {type(module).__name__} cannot be asymmetric, since the zeros that it is "
            f"padded with have no offset; leave asymmetric_activations out of module_overrides[{name!r}]"
        )
    return False


def _first_last_bits(bits: dict[str, int | None], name: str, config: OctavConfig) -> dict[str, int | None]:
    """``first_last_bits`` for each operand that is quantized."""
    if not any(bits.values()):
        raise ValueError(
            f"first_last_bits={config.first_last_bits} has no effect on {name}, whose weight_bits and activation_bits "
            "are None; set one of them, or first_last_bits=None"
        )
    return {operand: number and config.first_last_bits for operand, number in bits.items()}


def _check_holds_no_weight(name: str, module: nn.Module) -> None:
    unknown = unknown_weights(module)
    if unknown:
        shape = tuple(module.get_parameter(unknown[0]).shape)
        raise ValueError(
            f"{name}: {type(module).__name__} with {unknown[0]} of shape {shape} is not a layer that can be quantized; "
            "name it in exclude_modules to leave it in float"
        )


def _check_convertible(name: str, module: nn.Module, quantized_class: type[QuantizedLayer]) -> None:
    float_class = quantized_class.float_class
    remedy = "name it in exclude_modules to leave it in float"
    described = type(module).__name__
    weight = module._parameters.get("weight")
    if weight is not None:
        described += f" with weight of shape {tuple(weight.shape)}"
    if type(module) is not float_class:
        raise ValueError(
            f"{name}: {described} is a subclass of nn.{float_class.__name__} that may compute something else; {remedy}"
        )
    reason = quantized_class.unsupported_reason(module)
    if reason:
        raise ValueError(f"{name}: {described} cannot be quantized: {reason}, or {remedy}")
