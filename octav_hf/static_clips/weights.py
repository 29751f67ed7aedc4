"""``freeze_weight_clips`` and ``unfreeze_weight_clips``: static and dynamic clips of weights."""

import logging
from collections.abc import Iterable
from typing import Any, TypeVar

from torch import nn

from .._utils.sharded_weights import sharded_shape
from ..conversion.modules import layers_by_quantizer, layers_to_freeze, shared_weights
from ..conversion.output_embeddings import requantize_output_embeddings
from ..conversion.record import check_quantized, has_frozen_weight_clips, is_packed
from ..nn import FrozenWeightFakeQuantize

logger = logging.getLogger(__name__)

Model = TypeVar("Model", bound=nn.Module)


def freeze_weight_clips(model: Model) -> Model:
    """Freeze the clips of all weights at their present values, in place; training no longer changes them.

    Called before training together with ``calibrate_octav``, this is the paper's static quantization (Appendix E.3).
    The clips are buffers, ``<layer>.weight_quantizer.clips``, ``[rows, 1, ...]`` (0-dim for one clip per tensor),
    float32, or float64 for a float64 weight; they are saved with the weights, and ``pack_octav`` uses them. Embedding
    tables, whose rows are quantized when they are looked up, keep dynamic clips, and so do weights that several modules
    share, such as a head tied to the token embeddings; a warning names those.

    Args:
        model: quantized by ``apply_octav``, not packed and not sharded.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``.
        ValueError: the model is not quantized by ``apply_octav``, is packed, has frozen clips of weights already or no
            weight whose clips could be frozen, or a weight holds NaN or Inf or is sharded. The model is then as it was.
    """
    check_quantized(model, "freeze_weight_clips")
    requantize_output_embeddings(model)
    if is_packed(model):
        raise ValueError(f"{type(model).__name__} is packed, and its clips with it; call unpack_octav(model) first")
    if has_frozen_weight_clips(model):
        raise ValueError(
            f"the clips of {type(model).__name__}'s weights are frozen already; call unfreeze_weight_clips(model) to "
            "have them follow the weights again"
        )
    shared, found = shared_weights(model), layers_to_freeze(model)
    layers = {name: layer for name, layer in found.items() if layer not in shared}
    if not layers:
        raise ValueError(f"{type(model).__name__} has no quantized weight whose clips could be frozen")
    for name, layer in layers.items():
        shape = sharded_shape(layer.weight)
        if shape is not None:
            raise ValueError(f"{name}: its weight of shape {shape} is sharded; freeze the clips before you shard it")
    quantizers = [FrozenWeightFakeQuantize.of(layer.weight_quantizer, layer.weight) for layer in layers.values()]
    for layer, quantizer in zip(layers.values(), quantizers, strict=True):
        layer.weight_quantizer = quantizer
    dynamic = [name for name in found if name not in layers]
    if dynamic:
        logger.warning("Several modules share these weights, and their clips stay dynamic: %s", ", ".join(dynamic))
    return model


def unfreeze_weight_clips(model: Model) -> Model:
    """Undo ``freeze_weight_clips``, in place: the clips follow the weights again.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``.
        ValueError: the model has no frozen clips of weights, or is packed.
    """
    check_quantized(model, "unfreeze_weight_clips")
    if is_packed(model):
        raise ValueError(f"{type(model).__name__} is packed, and its clips with it; call unpack_octav(model) first")
    if not has_frozen_weight_clips(model):
        raise ValueError(f"unfreeze_weight_clips: no clip of a weight of {type(model).__name__} is frozen")
    for layer in frozen_layers(model).values():
        layer.weight_quantizer = layer.weight_quantizer_class(**layer.weight_quantizer.init_kwargs)
    return model


def prepare_frozen(model: nn.Module, names: Iterable[str]) -> None:
    """Give these layers of a converted model buffers to load their clips into."""
    layers = layers_to_freeze(model)
    for name in names:
        layers[name].weight_quantizer = FrozenWeightFakeQuantize.to_load(
            layers[name].weight_quantizer, layers[name].weight
        )


def frozen_layers(model: nn.Module) -> dict[str, Any]:
    """Name -> layer whose weight has frozen clips."""
    return layers_by_quantizer(model, FrozenWeightFakeQuantize)
