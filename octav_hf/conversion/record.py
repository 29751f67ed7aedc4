"""What a converted model is quantized with: what was asked of it, and what its modules say, which is what is saved."""

from dataclasses import replace

from torch import nn
from transformers import PreTrainedModel

from ..config import OctavConfig
from ..nn import FakeQuantize, PackedLayer, QuantizedLayer
from ..nn.stored_clips import ActivationClips, frozen_fields
from .modules import activation_quantizers


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
    """Whether a weight of the model has frozen clips, or had when it was packed."""
    layers = (module for module in model.modules() if isinstance(module, QuantizedLayer))
    return any(
        isinstance(layer.weight_quantizer, FakeQuantize) and layer.weight_quantizer.is_frozen for layer in layers
    )


def config_name(path: str, operand: str, quantizer_name: str) -> str:
    """A module's name for the config: the one at conversion, if an adapter has wrapped the module since."""
    name = ".".join(part for part in path.split(".") if part != "base_layer")
    return name if quantizer_name == f"{name} {operand}" else path


def _replaced_layers(model: nn.Module) -> list[str]:
    """The layers that were converted and that a float module has replaced since; not one that an adapter wraps."""
    modules = dict(model.named_modules())
    # A resized head is quantized again in the next forward pass.
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    return [
        name
        for name in model.__dict__["octav_layers"]
        if name in modules
        and modules[name] is not head
        and not any(isinstance(module, QuantizedLayer) for module in modules[name].modules())
    ]


def recorded_config(model: nn.Module) -> OctavConfig:
    """What ``config.json`` says of a converted model: what was asked, with the state that its modules are in now."""
    clips: ActivationClips = {}
    for path, operand, quantizer in activation_quantizers(model):
        if quantizer.frozen is not None:
            name = config_name(path, operand, quantizer.name)
            clips.setdefault(name, {})[operand] = frozen_fields(quantizer.frozen)
    asked = asked_config(model, "recorded_config")
    return replace(
        asked,
        exclude_modules=[*asked.exclude_modules, *_replaced_layers(model)],
        packed=is_packed(model),
        frozen_weight_clips=has_frozen_weight_clips(model),
        activation_clips=clips,
    )


def write_record(model: nn.Module) -> None:
    """Have a Transformers model save what its modules are; call it after each change of them, and before saving."""
    quantizer = model.__dict__.get("hf_quantizer")
    if quantizer is not None:
        quantizer.quantization_config = model.config.quantization_config = recorded_config(model)  # type: ignore[union-attr]
