"""``apply_octav`` and ``remove_octav``: a float model becomes a quantized one, in place, and a float one again."""

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
from ..nn import QuantizedLayer
from .modules import quantized_modules
from .plan import plan_conversion
from .record import keep_head_clips, requantize_output_embeddings
from .request import ModulePlan

Model = TypeVar("Model", bound=nn.Module)


def apply_octav(model: Model, config: OctavConfig | None = None) -> Model:
    """Quantize the operands of the model's layers and attention matmuls, in place, for training and evaluation.

    Each layer of ``nn.QUANTIZED_LAYERS`` (``nn.Linear``, ``nn.Conv1d``, ``nn.Conv2d``; ``nn.Embedding`` where
    ``embedding_bits`` is set) becomes its quantized class and every attention module a ``QuantizedAttention``: the same
    objects, with the same parameters under the same names, so that optimizers, tied weights and hooks stay valid. A
    Transformers model also gets a ``quantization_config``, which ``save_pretrained`` writes and ``from_pretrained``
    applies again.

    Args:
        model: a Transformers model, or any ``nn.Module``. Its ``attn_implementation`` must be eager or sdpa.
        config: what to quantize, and how; ``None`` is ``OctavConfig()``, the paper's recipe at 4 bits.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``, or ``config`` not an ``OctavConfig``.
        ValueError: the model is quantized already, has no layer to quantize, or has a module that cannot be quantized;
            or a name pattern of the config matches nothing. The model is then unchanged.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"apply_octav takes a model (an nn.Module), got {type(model).__name__}")
    config = OctavConfig() if config is None else config
    if not isinstance(config, OctavConfig):
        raise TypeError(
            f"apply_octav takes an OctavConfig, got {type(config).__name__}; write OctavConfig(weight_bits=4)"
        )
    if config.packed:
        raise ValueError("packed=True is not for apply_octav; train the model first, then call pack_octav(model)")
    if config.frozen_weight_clips:
        raise ValueError(
            "frozen_weight_clips=True is not for apply_octav; leave it out, then call calibrate_octav(model, "
            "weights=True)"
        )
    if config.clips_of_version_1:
        raise ValueError(
            "this config is of a checkpoint of format version 1, whose frozen clips are not for apply_octav; load that "
            "checkpoint with from_pretrained, or call calibrate_octav on this model"
        )
    _check_not_quantized(model)
    convert_modules(model, config, plan_conversion(model, config))
    if isinstance(model, PreTrainedModel):  # gets what from_pretrained gives a model beside quantized modules
        quantizer = AutoHfQuantizer.from_config(copy.deepcopy(config), pre_quantized=False)
        model.__dict__.update(hf_quantizer=quantizer, is_quantized=True, quantization_method=config.quant_method)
        quantizer.postprocess_model(model)
    return model


def remove_octav(model: Model) -> Model:
    """Undo ``apply_octav`` in place: the float model, with its weights as they are now.

    Returns:
        ``model``.

    Raises:
        ValueError: no module of the model was quantized by ``apply_octav``.
    """
    if not any(True for _ in quantized_modules(model)):
        raise ValueError(f"remove_octav: {type(model).__name__} has no module quantized by apply_octav")
    restore_modules(model)
    for module in model.modules():  # the model may stand inside another, such as PEFT's
        if isinstance(module, PreTrainedModel):
            quantizer = module.__dict__.get("hf_quantizer")
            if quantizer is not None:
                quantizer.remove_quantization_config(module)
            mark_as_float(module)
    return model


def convert_modules(model: nn.Module, config: OctavConfig, plan: Sequence[ModulePlan]) -> None:
    """Carry out the ``plan`` that ``plan_conversion`` made for a float ``model`` and ``config``, in place."""
    for module_plan in plan:
        module_plan.convert()
    converted = {module_plan.name: module_plan.quantized_class for module_plan in plan}
    model.__dict__.update(octav_config=copy.deepcopy(config), octav_modules=converted)
    model.octav_state_dict_hook = model.register_load_state_dict_pre_hook(_cover_tied_layers)
    if isinstance(model, PreTrainedModel) and isinstance(model.get_output_embeddings(), QuantizedLayer):
        handle = model.register_forward_pre_hook(requantize_output_embeddings)
        model.octav_output_embeddings_hook = handle  # type: ignore[assignment]
        keep_head_clips(model)


def restore_modules(model: nn.Module) -> None:
    """Undo ``convert_modules``, and what else a quantized model was given, in place."""
    for converted in list(quantized_modules(model)):
        converted.restore()
    for module in model.modules():
        if "octav_packed_hook" in module.__dict__:
            release_packed(module)
        for name in ("octav_config", "octav_modules", "octav_head_quantizer"):
            module.__dict__.pop(name, None)
        unset_upload(module)
        for name in ("octav_output_embeddings_hook", "octav_state_dict_hook"):
            hook = module.__dict__.pop(name, None)
            if hook is not None:
                hook.remove()


def freeze_packed(model: nn.Module) -> None:
    """Leave nothing to train in a packed model but what is added to it later; without that, training is refused."""
    model.requires_grad_(False)
    model.octav_packed_hook = model.register_forward_pre_hook(_refuse_training)  # type: ignore[assignment]


def release_packed(model: nn.Module) -> None:
    """Undo ``freeze_packed``."""
    model.__dict__.pop("octav_packed_hook").remove()
    model.requires_grad_(True)


def _cover_tied_layers(model: nn.Module, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
    """Make clips dynamic where a state dict has neither them nor the layer's weight, but has that by a tied name.

    A file has a tied weight once, so the layer itself cannot tell such a state dict from one of other modules.
    """
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(f"{prefix}{name}")
    for path, layer in model.named_modules():
        own = f"{prefix}{path}."
        if not isinstance(layer, QuantizedLayer) or layer.is_covered(state_dict, own):
            continue
        if any(name in state_dict for name in names.get(id(own_parameters(layer).get("weight")), ())):
            layer.unfreeze_missing(state_dict, own)


def _check_not_quantized(model: nn.Module) -> None:
    if any(True for _ in quantized_modules(model)):
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
    """Forward pre-hook of a packed model: a step that could change nothing is a mistake."""
    if model.training and torch.is_grad_enabled() and not any(p.requires_grad for p in model.parameters()):
        raise RuntimeError(
            f"{type(model).__name__} is packed, and packed weights cannot be trained; call "
            "octav_hf.unpack_octav(model) before training, or model.eval() for evaluation"
        )
