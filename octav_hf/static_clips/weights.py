"""Freeze the clips of weights at their current values."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from .._utils.sharded_weights import sharded_shape
from ..conversion.modules import layers_to_freeze, shared_weights
from ..conversion.output_embeddings import requantize_output_embeddings
from ..conversion.record import check_quantized, is_packed

logger = logging.getLogger(__name__)


@contextmanager
def frozen_weights(model: nn.Module) -> Iterator[None]:
    """Context that freezes the clips of all weights at their current values; an error inside restores them.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``.
        ValueError: as ``calibrate_octav``. Nothing is frozen then.
    """
    layers = _layers(model)
    before = {layer: layer.weight_quantizer.frozen for layer in layers.values()}
    try:
        zero, stuck = [], []
        for name, layer in layers.items():
            quantizer = layer.weight_quantizer
            if not bool(layer.weight.any()):  # a clip of 0 would let no value and no gradient through
                quantizer.unfreeze()
                zero.append(name)
                continue
            quantizer.freeze_at(layer.weight)
            if not bool(quantizer.frozen.clips.all()):
                stuck.append(name)
        if zero:
            logger.warning("These weights are all 0, so their clips are dynamic: %s", ", ".join(zero))
        if stuck:
            logger.warning(
                "These weights have rows or groups that are all 0, whose frozen clip is 0, so that they stay 0 in "
                "training: %s. To train them, call uncalibrate_octav(model, activations=False).",
                ", ".join(stuck),
            )
        yield
    except BaseException:
        for layer, frozen in before.items():
            if frozen is None:
                layer.weight_quantizer.unfreeze()
            else:
                layer.weight_quantizer.freeze(frozen)
        raise


def _layers(model: nn.Module) -> dict[str, Any]:
    """Full name -> layer, for the layers whose weight clips to freeze."""
    check_quantized(model, "calibrate_octav")
    kind = type(model).__name__
    if is_packed(model):
        raise ValueError(
            f"calibrate_octav: {kind} is packed, including the clips of its weights; leave weights=True out, or call "
            "unpack_octav(model) first"
        )
    requantize_output_embeddings(model)
    found, shared = layers_to_freeze(model), shared_weights(model)
    layers = {name: layer for name, layer in found.items() if layer not in shared}
    if not layers:
        raise ValueError(f"calibrate_octav: {kind} has no quantized weight whose clips could be frozen")
    for name, layer in layers.items():
        shape = sharded_shape(layer.weight)
        if shape is not None:
            raise ValueError(f"{name}: its weight of shape {shape} is sharded; freeze the clips before you shard it")
        if layer.weight.is_meta:
            raise ValueError(
                f"{name}: its weight of shape {tuple(layer.weight.shape)} is offloaded or has no values; load the "
                "whole model before freezing its clips"
            )
    dynamic = [name for name in found if name not in layers]
    if dynamic:
        logger.warning("Several modules share these weights, so their clips stay dynamic: %s", ", ".join(dynamic))
    return layers
