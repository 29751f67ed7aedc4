"""``freeze_weight_clips`` and ``unfreeze_weight_clips``: clips of weights that are stored, or follow them again."""

import logging
from collections.abc import Iterable
from typing import Any, TypeVar

from torch import nn

from .._utils.sharded_weights import sharded_shape
from ..conversion.modules import layers_by_quantizer, layers_to_freeze, shared_weights
from ..conversion.record import asked_config, has_frozen_weight_clips, is_packed, write_record
from ..nn import FrozenWeightFakeQuantize

logger = logging.getLogger(__name__)

Model = TypeVar("Model", bound=nn.Module)


def freeze_weight_clips(model: Model) -> Model:
    """Store the clips of all weights as they are now, in place; they no longer follow the weights in training.

    With ``calibrate_octav`` for the activations this is the paper's static quantization (Appendix E.3): call both
    before training. The clips are buffers, ``<layer>.weight_quantizer.clips``, ``[rows, 1, ...]`` (0-dim if there is
    one for the tensor), in float32, or float64 for a float64 weight. They are saved and loaded with the weights, and
    ``pack_octav`` takes them. Embedding tables, whose rows are quantized as they are looked up, keep dynamic clips. So
    do weights that several modules share, as a language-model head and the token embeddings often do; a warning names
    them.

    Args:
        model: quantized by ``apply_octav``, not packed and not sharded.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``.
        ValueError: the model is not quantized by ``apply_octav``, is packed, has frozen clips of weights already or no
            weight whose clips could be frozen, or a weight holds NaN or Inf or is sharded. The model is then as it was.
    """
    asked_config(model, "freeze_weight_clips")
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
    write_record(model)
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
    asked_config(model, "unfreeze_weight_clips")
    if is_packed(model):
        raise ValueError(f"{type(model).__name__} is packed, and its clips with it; call unpack_octav(model) first")
    if not has_frozen_weight_clips(model):
        raise ValueError(f"unfreeze_weight_clips: no clip of a weight of {type(model).__name__} is frozen")
    for layer in frozen_layers(model).values():
        layer.weight_quantizer = layer.weight_quantizer_class(**layer.weight_quantizer.init_kwargs)
    write_record(model)
    return model


def prepare_frozen(model: nn.Module, names: Iterable[str]) -> None:
    """Give these layers of a model that was converted, and not loaded yet, clips to load into."""
    layers = layers_to_freeze(model)
    for name in names:
        layers[name].weight_quantizer = FrozenWeightFakeQuantize.to_load(
            layers[name].weight_quantizer, layers[name].weight
        )


def frozen_layers(model: nn.Module) -> dict[str, Any]:
    """Name -> layer whose weight has frozen clips."""
    return layers_by_quantizer(model, FrozenWeightFakeQuantize)
