"""The config of a converted model: as it was requested, and as its modules are now, which is what is saved."""

import glob
from dataclasses import replace
from typing import Any

from torch import nn

from ..config import OctavConfig
from ..nn import (
    FakeQuantize,
    FrozenClips,
    PackedLayer,
    PackedWeight,
    QuantizedAttention,
    QuantizedLayer,
    WeightFakeQuantize,
)
from .layers import plan_layers
from .modules import layers_to_freeze, shared_weights
from .request import Request


def asked_config(model: nn.Module, function: str) -> OctavConfig:
    """The config that a model was converted with, for a public ``function`` whose name errors begin with.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``.
        ValueError: it is not the model that was converted.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function} takes a model (an nn.Module), got {type(model).__name__}")
    config = model.__dict__.get("octav_config")
    if config is None:
        raise ValueError(
            f"{function}: {type(model).__name__} is not a model that apply_octav was called on; pass that model, not "
            "one around it or inside it, or call apply_octav and train first"
        )
    return config


def is_packed(model: nn.Module) -> bool:
    """Whether a layer of the model is packed."""
    return any(isinstance(module, PackedLayer) for module in model.modules())


def has_frozen_weight_clips(model: nn.Module) -> bool:
    """Whether all weights that can have frozen clips have them, or had when they were packed."""
    shared = shared_weights(model)
    states = [
        layer.weight_quantizer.is_frozen
        for layer in model.modules()
        if isinstance(layer, QuantizedLayer)
        and layer not in shared
        and issubclass(layer.weight_quantizer_class, WeightFakeQuantize)
        and isinstance(layer.weight_quantizer, WeightFakeQuantize | PackedWeight)
    ]
    return bool(states) and all(states)


def _replaced(model: nn.Module, kind: type[nn.Module]) -> list[str]:
    """The names of converted modules of ``kind`` that are float modules now. One that an adapter wraps is not."""
    modules = dict(model.named_modules())
    return [
        name
        for name, quantized_class in model.__dict__["octav_modules"].items()
        if issubclass(quantized_class, kind)
        and name in modules
        and not any(isinstance(module, kind) for module in modules[name].modules())
    ]


def recorded_config(model: nn.Module) -> OctavConfig:
    """The config to save: the requested one, with the present state of the model's modules."""
    asked = asked_config(model, "recorded_config")
    overrides = dict(asked.module_overrides)
    for name in _replaced(model, QuantizedAttention):
        overrides[name] = overrides.get(name, {}) | {"quantize_attention": False}
    return replace(
        asked,
        exclude_modules=[*asked.exclude_modules, *map(glob.escape, _replaced(model, QuantizedLayer))],
        module_overrides=overrides,
        packed=is_packed(model),
        frozen_weight_clips=has_frozen_weight_clips(model),
    )


def keep_head_clips(model: nn.Module) -> None:
    """Give a quantized head the frozen clips of its input that the head before it had, and remember its quantizer."""
    quantizer = getattr(model.get_output_embeddings(), "input_quantizer", None)  # type: ignore[operator]
    before = model.__dict__.get("octav_head_quantizer")
    if isinstance(before, FakeQuantize) and isinstance(quantizer, FakeQuantize) and before is not quantizer:
        frozen = before.frozen
        if frozen is not None:
            device = model.get_output_embeddings().weight.device  # type: ignore[operator]
            offset = None if frozen.offset is None else frozen.offset.to(device)
            quantizer.freeze(FrozenClips(frozen.signed, frozen.clips.to(device), offset))
    model.__dict__["octav_head_quantizer"] = quantizer


def requantize_output_embeddings(model: nn.Module, args: Any = ()) -> None:
    """Quantize the new layer that ``resize_token_embeddings`` puts in the place of a quantized head.

    A forward pre-hook; also called before anything is packed or recorded.
    """
    head: Any = model.get_output_embeddings() if "octav_output_embeddings_hook" in model.__dict__ else None  # type: ignore[operator]
    if head is None or isinstance(head, QuantizedLayer):
        return
    config = model.__dict__["hf_quantizer"].quantization_config
    has_frozen_clips, has_packed_weights = has_frozen_weight_clips(model), is_packed(model)
    for module_plan in plan_layers(Request.of(model, config)):
        if module_plan.module is head:
            module_plan.convert()
    keep_head_clips(model)
    if head in shared_weights(model):
        return
    for layer in layers_to_freeze(head).values():
        if has_frozen_clips:
            layer.weight_quantizer.freeze_at(layer.weight)
        if has_packed_weights:
            PackedLayer.pack(layer, PackedWeight.pack(layer.weight_quantizer, layer.weight))
            layer.requires_grad_(False)


def write_records(model: nn.Module) -> None:
    """``write_record`` for each converted model in ``model``."""
    for module in model.modules():
        if "octav_config" in module.__dict__:
            write_record(module)


def write_record(model: nn.Module) -> None:
    """Update the config that a Transformers model saves; call it after each change of modules, and before saving."""
    requantize_output_embeddings(model)
    quantizer = model.__dict__.get("hf_quantizer")
    if quantizer is not None:
        quantizer.quantization_config = model.config.quantization_config = recorded_config(model)  # type: ignore[union-attr]
