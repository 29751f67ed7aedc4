"""The config to save with a converted model, derived from its modules as they are now."""

import glob
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, replace
from typing import Any

from torch import nn

from ..config import ModuleSettings, OctavConfig
from ..nn import (
    FakeQuantize,
    PackedLayer,
    QuantizedAttention,
    QuantizedLayer,
    SynchronizedFakeQuantize,
    WeightFakeQuantize,
    quantized_class_of,
)
from ..nn.granularity import ATTENTION_OPERANDS, Granularity, granularity_of
from .attention_modules import attention_modules
from .modules import is_quantized, shared_weights

# Parts of names that wrappers for sharding and activation checkpointing add; the state dict does not have them.
_WRAPPERS = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def is_packed(model: nn.Module) -> bool:
    """Whether any layer of the model is packed."""
    return any(isinstance(module, PackedLayer) for module in model.modules())


def check_quantized(model: nn.Module, function: str) -> None:
    """Check the argument ``model`` of the public function named ``function``.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``.
        ValueError: no module of ``model`` is quantized.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function} takes a model (an nn.Module), got {type(model).__name__}")
    if not is_quantized(model):
        raise ValueError(
            f"{function}: {type(model).__name__} has no module quantized by apply_octav; call "
            "apply_octav(model, OctavConfig()) first"
        )


def named_by_state_dict(model: nn.Module) -> dict[str, nn.Module]:
    """All modules except quantizers, by all their names in the state dict."""
    named = model.named_modules(remove_duplicate=False)  # T5's embedding may be one module with three names
    return {
        ".".join(part for part in name.split(".") if part not in _WRAPPERS): module
        for name, module in named
        if not name.endswith("_quantizer")
    }


def recorded_config(model: nn.Module) -> OctavConfig:
    """The config that converts the float model to the modules of ``model``.

    It is the config given to ``apply_octav``, plus overrides with exact names for modules that differ from it. Without
    such a config, or if its patterns contradict the modules, it is based on the settings of most modules.

    Raises:
        ValueError: a module has quantizers that no config can describe; the message names it.
    """
    modules = named_by_state_dict(model)
    actual = {
        name: settings for name, module in modules.items() if (settings := _settings_of(name, module)) is not None
    }
    shared = shared_weights(model)
    for name, settings in actual.items():
        if modules[name] in shared:  # clips of shared weights are never frozen
            settings.pop("frozen_weight_clips", None)
    asked = model.__dict__.get("octav_config")
    if asked is not None:
        is_frozen = _most_common(_values("frozen_weight_clips", actual.values())) or False
        asked = replace(asked, frozen_weight_clips=is_frozen)
    record = None if asked is None else _with_exceptions(modules, actual, asked)
    if record is None:
        record = _with_exceptions(modules, actual, _shared_config(model, modules, actual))
    assert record is not None  # it has no patterns to contradict the modules
    return replace(record, packed=is_packed(model))


Settings = dict[str, Any]
"""The fields of ``ModuleSettings`` that matter to one module; granularities of its own operands only."""


def _settings_of(name: str, module: nn.Module) -> Settings | None:
    """The settings of a quantized module; ``None`` for other modules."""
    if isinstance(module, QuantizedAttention):
        quantizers = module.operand_quantizers
        settings = [_activation_settings(name, operand, quantizers[operand]) for operand in ATTENTION_OPERANDS]
        if any(other != settings[0] for other in settings):
            raise ValueError(
                f"{name}: the quantizers of its attention operands differ in bits, clip or gradient estimator, which "
                "the config cannot express; give all four the same settings"
            )
        granularity = {
            operand: granularity_of(operand, quantizer.dim, quantizer.group_size)
            for operand, quantizer in quantizers.items()
            if isinstance(quantizer, FakeQuantize)
        }
        sizes = _group_size(name, quantizers)
        return {"quantize_attention": True, **settings[0], "activation_granularity": granularity, **sizes}
    if not isinstance(module, QuantizedLayer):
        return None
    values: dict[str, Any] = {}
    weight, field = module.weight_quantizer, module.operands["weight"]
    values[field] = _bits(name, "weight", weight)
    if isinstance(weight, FakeQuantize):
        values |= _clip_settings("weight", weight)
        if len(module.weight_granularities) > 1:
            values["weight_granularity"] = Granularity(granularity_of("weight", weight.dim, weight.group_size))
        if issubclass(module.weight_quantizer_class, WeightFakeQuantize):
            values["frozen_weight_clips"] = weight.is_frozen
    if "input" in module.operands:
        values |= _input_settings(name, module)
    return values | _group_size(name, module.operand_quantizers)


def _input_settings(name: str, layer: QuantizedLayer) -> dict[str, Any]:
    quantizer = layer.input_quantizer
    values = _activation_settings(name, "input", quantizer)
    if isinstance(quantizer, FakeQuantize):
        values["unsigned_activations"] = quantizer.signed is None
        if layer.supports_asymmetric_input:
            values["asymmetric_activations"] = quantizer.asymmetric
        if len(layer.input_granularities) > 1:
            values["activation_granularity"] = {"input": granularity_of("input", quantizer.dim, quantizer.group_size)}
    return values


def _activation_settings(name: str, operand: str, quantizer: nn.Module) -> dict[str, Any]:
    bits = {"activation_bits": _bits(name, operand, quantizer)}
    return bits | _clip_settings("activation", quantizer) if isinstance(quantizer, FakeQuantize) else bits


def _group_size(name: str, quantizers: Mapping[str, nn.Module]) -> dict[str, int]:
    each = (quantizer for quantizer in quantizers.values() if isinstance(quantizer, FakeQuantize))
    sizes = {quantizer.group_size for quantizer in each if quantizer.group_size is not None}
    if len(sizes) > 1:
        raise ValueError(
            f"{name}: its operands have groups of {' and '.join(map(str, sorted(sizes)))} elements, which the config "
            "cannot express; give all of them the same group_size"
        )
    return {"group_size": sizes.pop()} if sizes else {}


def _bits(name: str, operand: str, quantizer: nn.Module) -> int | None:
    if isinstance(quantizer, FakeQuantize):
        return quantizer.num_bits
    if isinstance(quantizer, nn.Identity):
        return None
    raise ValueError(
        f"{name}: the quantizer of its {operand} is a {type(quantizer).__name__}, which the config cannot express; use "
        "a FakeQuantize, or an nn.Identity to leave the operand in float"
    )


def _clip_settings(side: str, quantizer: FakeQuantize) -> dict[str, Any]:
    values = (quantizer.clip, quantizer.clip_options, quantizer.gradient_estimator)
    return dict(zip((f"{side}_clip", f"{side}_clip_options", f"{side}_gradient_estimator"), values, strict=True))


def _differences(actual: Settings, settings: ModuleSettings) -> dict[str, Any]:
    """The fields in which ``settings`` differ from the module, with the values of the module."""
    different = {}
    for field, value in actual.items():
        if field == "activation_granularity":
            if any(settings.granularity(operand) != granularity for operand, granularity in value.items()):
                different[field] = settings.activation_granularity | value
        elif getattr(settings, field) != value:
            different[field] = value
    if different.get("unsigned_activations") is False and settings.asymmetric_activations:
        different["asymmetric_activations"] = False  # True would be invalid without unsigned_activations
    return different


def _with_exceptions(
    modules: Mapping[str, nn.Module], actual: Mapping[str, Settings], config: OctavConfig
) -> OctavConfig | None:
    """``config`` with overrides for modules that differ from it; ``None`` if its patterns contradict ``actual``."""
    # Overrides replace first_last_bits, because they also work for other model classes.
    before, config = None, replace(config, first_last_bits=None)
    while config != before:  # an override of an attention module also changes the layers in it
        attention = attention_modules(modules, config.attention_modules)
        quantized_attention = {name for name in actual if isinstance(modules[name], QuantizedAttention)}
        left_out = config.left_out(modules)
        if left_out.keys() & actual.keys() or quantized_attention - attention.keys():
            return None
        before, exclude, overrides = config, list(config.exclude_modules), dict(config.module_overrides)
        for name, settings in config.settings_for(name for name in modules if name not in left_out).items():
            different: dict[str, Any] = {}
            layer = quantized_class_of(modules[name])
            if name in actual:
                different = _differences(actual[name], settings)
            elif name in attention and settings.quantize_attention and settings.activation_bits is not None:
                different = {"quantize_attention": False}
            elif layer is not None and any(getattr(settings, field) for field in layer.operands.values()):
                exclude.append(glob.escape(name))
            if different:
                overrides[glob.escape(name)] = overrides.get(glob.escape(name), {}) | different
        config = replace(config, exclude_modules=exclude, module_overrides=overrides)
    return config


def _shared_config(model: nn.Module, modules: Mapping[str, nn.Module], actual: Mapping[str, Settings]) -> OctavConfig:
    """A config without patterns, with the most common value of each field."""
    values = {field.name: _most_common(_values(field.name, actual.values())) for field in fields(ModuleSettings)}
    granularity = {
        operand: _most_common(
            each[operand] for each in _values("activation_granularity", actual.values()) if operand in each
        )
        for operand in ("input", *ATTENTION_OPERANDS)
    }
    shared = {field: value for field, value in values.items() if value is not None}
    shared["activation_granularity"] = {operand: g for operand, g in granularity.items() if g is not None}
    shared |= {field: values[field] for field in ("weight_bits", "activation_bits", "embedding_bits")}
    if not shared.get("unsigned_activations", True):
        shared["asymmetric_activations"] = False
    attention = {name for name in actual if isinstance(modules[name], QuantizedAttention)}
    shared["quantize_attention"] = bool(attention)
    names = None if attention <= attention_modules(modules).keys() else sorted(attention)
    return OctavConfig(
        **shared,
        attention_modules=names and [glob.escape(name) for name in names],
        sync_activation_clips=any(isinstance(module, SynchronizedFakeQuantize) for module in model.modules()),
    )


def _values(field: str, settings: Iterable[Settings]) -> Iterator[Any]:
    return (each[field] for each in settings if field in each)


def _most_common(values: Iterable[Any]) -> Any:
    """The most common value, the first of several; ``None`` if there are no values."""
    values = list(values)
    counts = Counter(map(repr, values))
    return max(values, key=lambda value: counts[repr(value)], default=None)
