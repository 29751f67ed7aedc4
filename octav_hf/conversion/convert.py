"""``apply_octav`` and ``remove_octav``: convert a float model to a quantized one in place, and back."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import AutoHfQuantizer

from .._utils.torch_private import own_parameters
from .._utils.transformers_compat import mark_as_float, unset_upload
from ..config import OctavConfig
from ..nn import PackedWeight, QuantizedLayer
from . import output_embeddings
from .modules import is_quantized, quantized_modules, start_on_devices, transformers_models
from .plan import check_for_float_model, plan_conversion
from .record import recorded_config
from .request import ModulePlan

Model = TypeVar("Model", bound=nn.Module)


def apply_octav(model: Model, config: OctavConfig | None = None) -> Model:
    """Quantize the operands of the model's layers and attention matmuls, in place, for training and evaluation.

    Each layer of ``nn.QUANTIZED_LAYERS`` (``nn.Linear``, ``nn.Conv1d``, ``nn.Conv2d``; ``nn.Embedding`` if
    ``embedding_bits`` is set) gets its quantized class, and every attention module becomes a ``QuantizedAttention``.
    They stay the same objects, with the same parameters under the same names, so optimizers, tied weights and hooks
    stay valid. ``save_pretrained`` of a Transformers model writes a config that describes its modules, whether
    ``model`` is that model, a part of it or a wrapper around it; ``from_pretrained`` converts the model again.

    Args:
        model: a Transformers model, or any ``nn.Module``. Its ``attn_implementation`` must be eager or sdpa.
        config: what to quantize, and how; ``None`` for ``OctavConfig()``, the paper's recipe at 4 bits.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``, or ``config`` is not an ``OctavConfig``.
        ValueError: the model is already quantized, has no layer to quantize, or has a module that cannot be quantized;
            or a name pattern of the config matches nothing. The model is then unchanged.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"apply_octav takes a model (an nn.Module), got {type(model).__name__}")
    config = OctavConfig() if config is None else config
    if not isinstance(config, OctavConfig):
        raise TypeError(
            f"apply_octav takes an OctavConfig, got {type(config).__name__}; write OctavConfig(weight_bits=4)"
        )
    check_for_float_model(config)
    _check_not_quantized(model)
    convert_modules(model, config, plan_conversion(model, config))
    for inner in transformers_models(model):  # set the attributes that from_pretrained sets
        if is_quantized(inner):
            # The model's config is not changed, because other models may share it.
            asked = config if inner is model else recorded_config(inner)
            quantizer = AutoHfQuantizer.from_config(copy.deepcopy(asked), pre_quantized=False)
            inner.__dict__.update(hf_quantizer=quantizer, is_quantized=True, quantization_method=config.quant_method)
            inner.__dict__.setdefault("octav_config", asked)
            quantizer.attach(inner)
    return model


def remove_octav(model: Model) -> Model:
    """Undo ``apply_octav`` in place; weights keep their current values.

    Returns:
        ``model``.

    Raises:
        ValueError: no module of the model was quantized by ``apply_octav``.
    """
    if not is_quantized(model):
        raise ValueError(f"remove_octav: {type(model).__name__} has no module quantized by apply_octav")
    restore_modules(model)
    for module in model.modules():  # the Transformers model may be inside a wrapper, such as PEFT's
        if isinstance(module, PreTrainedModel):
            quantizer = module.__dict__.get("hf_quantizer")
            if quantizer is not None:
                quantizer.remove_quantization_config(module)
            mark_as_float(module)
    return model


def convert_modules(model: nn.Module, config: OctavConfig, plan: Sequence[ModulePlan]) -> None:
    """Carry out the ``plan`` of ``plan_conversion(model, config)``, in place."""
    for module_plan in plan:
        module_plan.convert()
    start_on_devices(model)
    model.__dict__["octav_config"] = copy.deepcopy(config)
    model.octav_state_dict_hook = model.register_load_state_dict_pre_hook(_before_loading)
    for inner in model.modules():  # also the decoder in an EncoderDecoderModel, which is resized on its own
        if isinstance(inner, PreTrainedModel):
            output_embeddings.attach(inner)


def restore_modules(model: nn.Module) -> None:
    """Undo ``convert_modules`` and remove all other attributes and hooks of a quantized model, in place."""
    for converted in list(quantized_modules(model)):
        converted.restore()
    release_packed(model)
    for module in model.modules():
        module.__dict__.pop("octav_config", None)
        unset_upload(module)
        output_embeddings.detach(module)
        hook = module.__dict__.pop("octav_state_dict_hook", None)
        if hook is not None:
            hook.remove()


def freeze_packed(model: nn.Module) -> None:
    """Freeze all parameters of a packed model, and refuse training unless others, as of an adapter, are added."""
    model.octav_packed_hook = model.register_forward_pre_hook(_refuse_training)  # type: ignore[assignment]
    for module in model.modules():
        parameters = own_parameters(module).items()
        trained = [name for name, value in parameters if value is not None and value.requires_grad]
        if trained:
            module.__dict__["octav_frozen_by_packing"] = trained
    model.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, PackedWeight):
            module.guard()


def release_packed(model: nn.Module) -> None:
    """Undo ``freeze_packed``, also in a part of the model; parameters that it did not freeze stay as they are."""
    for module in model.modules():
        if "octav_packed_hook" in module.__dict__:
            module.__dict__.pop("octav_packed_hook").remove()
        for name in module.__dict__.pop("octav_frozen_by_packing", ()):
            parameter = own_parameters(module).get(name)
            if parameter is not None:
                parameter.requires_grad_(True)


def _before_loading(model: nn.Module, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
    """Check a state dict before any of it is loaded, and unfreeze clips of layers whose weight has a tied name in it.

    A state dict may contain a tied weight under one name only, so the layer itself cannot tell that it is covered.
    """
    named = model.named_modules(prefix=prefix.removesuffix("."))
    layers = {f"{path}." if path else "": layer for path, layer in named if isinstance(layer, QuantizedLayer)}
    for own, layer in layers.items():
        layer.check_form(state_dict, own)
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(f"{prefix}{name}")
    for own, layer in layers.items():
        tied = names.get(id(own_parameters(layer).get("weight")), ())
        if not layer.is_covered(state_dict, own) and any(name in state_dict for name in tied):
            layer.unfreeze_missing(state_dict, own)


def _check_not_quantized(model: nn.Module) -> None:
    if is_quantized(model):
        raise ValueError(
            f"{type(model).__name__} is already quantized by apply_octav; use it as it is, or call "
            "remove_octav(model) first"
        )
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        raise ValueError(
            f"{type(model).__name__} is already quantized with {quantizer.quantization_config.quant_method!r}; load it "
            "without that quantization_config"
        )


def _refuse_training(model: nn.Module, args: Any) -> None:
    """Forward pre-hook of a packed model: refuse a training step that could not change any parameter."""
    if model.training and torch.is_grad_enabled() and not any(p.requires_grad for p in model.parameters()):
        raise RuntimeError(
            f"{type(model).__name__} is packed, but packed weights cannot be trained; call "
            "octav_hf.unpack_octav(model) before training, or model.eval() for evaluation"
        )
