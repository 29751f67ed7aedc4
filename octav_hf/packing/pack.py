"""``pack_octav`` and ``unpack_octav``: converting weights to integers and scales, and back."""

import logging
from collections.abc import Container
from dataclasses import replace
from typing import Any, TypeVar

from torch import nn

from .._utils.progress import progress
from .._utils.sharded_weights import sharded_shape
from .._utils.torch_private import own_parameters
from ..conversion.convert import freeze_packed, release_packed
from ..conversion.layers import plan_layers
from ..conversion.modules import activation_quantizers, layers_by_quantizer, shared_weights
from ..conversion.output_embeddings import requantize_output_embeddings
from ..conversion.record import check_quantized, is_packed, recorded_config
from ..conversion.request import Request
from ..nn import FakeQuantize, PackedLayer, PackedWeight, QuantizedAttention
from ..nn.attention.arithmetic import SIMULATED

logger = logging.getLogger(__name__)

Model = TypeVar("Model", bound=nn.Module)


def pack_octav(model: Model, *, embedding_bits: int | None = None) -> Model:
    """Store the quantized weights as integers of their bit width and one scale per row or group, in place.

    The outputs stay bitwise the same: a packed layer dequantizes its weight whenever it is used. Only a quantized
    embedding table that the model reads by its ``weight``, without calling it, was in float there and is quantized now.
    For a Transformers model ``save_pretrained`` and ``push_to_hub`` then write the packed form, which
    ``from_pretrained`` loads. Packed weights are read-only: writing to one, replacing it or making it trainable is a
    ``RuntimeError``. Other parameters are frozen (``requires_grad`` False). To continue training call ``unpack_octav``;
    adapters on the packed model can be trained without it.

    A weight that several modules share, such as a language-model head and the token embeddings, stays in floating point
    and is quantized when used, as in training; a warning names it. Static clips of activations that were learned become
    static ones that do not learn, also after ``unpack_octav``.

    Args:
        model: quantized by ``apply_octav``.
        embedding_bits: 2 to 8 also quantizes and packs the embedding tables of a model that was trained without
            ``OctavConfig.embedding_bits``, one scale per row. This changes the outputs a little.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``.
        ValueError: the model is not quantized by ``apply_octav``, or packed already; a weight holds NaN or Inf, or is
            sharded; ``embedding_bits`` contradicts the config, or a table is shared. The model is then unchanged.
    """
    check_quantized(model, "pack_octav")
    requantize_output_embeddings(model)
    if is_packed(model):
        raise ValueError(f"{type(model).__name__} is packed already; save it as it is")
    tables: list[Any] = []  # plans of embeddings
    if embedding_bits is not None:
        config = recorded_config(model)
        if config.embedding_bits not in (None, embedding_bits):
            raise ValueError(
                f"embedding_bits={embedding_bits}, but the model was trained with "
                f"embedding_bits={config.embedding_bits}; leave it out"
            )
        config = replace(config, embedding_bits=embedding_bits)
        tables = [table for table in plan_layers(Request.of(model, config)) if isinstance(table.module, nn.Embedding)]
    quantized = quantized_weights(model)
    for table in tables:
        quantizer_class, init_kwargs = table.quantizers["weight"]
        quantized[table.name] = table.module, quantizer_class(**init_kwargs)
    shared = shared_weights(model)
    for name, (layer, _) in quantized.items():
        _check_packable(name, layer)
    for table in tables:
        if table.module in shared:
            raise ValueError(
                f"{table.name}: other modules share this table of {table.module.num_embeddings} rows, which has to "
                "stay in floating point for them; leave embedding_bits out"
            )
    unshared = progress([pair for pair in quantized.values() if pair[0] not in shared], "packing weights")
    packed = [(layer, PackedWeight.pack(quantizer, layer.weight)) for layer, quantizer in unshared]
    if not packed:
        raise ValueError(f"{type(model).__name__} has no quantized weight of its own, so there is nothing to pack")
    for table in tables:
        table.convert()
    if tables and "octav_config" in model.__dict__:
        model.octav_config = replace(model.octav_config, embedding_bits=embedding_bits)  # type: ignore[type-var]
    for layer, weight in packed:
        PackedLayer.pack(layer, weight)
    for _, _, quantizer in activation_quantizers(model):
        if quantizer.frozen is not None:
            quantizer.freeze(quantizer.frozen)  # learned clips as they are now
    freeze_packed(model)
    left = [name for name, (layer, _) in quantized.items() if layer in shared]
    if left:
        logger.warning(
            "Stored in floating point, since several modules share the weight, and quantized when used: %s",
            ", ".join(left),
        )
    return model


def unpack_octav(model: Model) -> Model:
    """Undo ``pack_octav`` in place, for training: weights are parameters with the packed values.

    Unless ``calibrate_octav`` froze them, clips are recomputed from these values. They differ slightly from those
    before packing, and so do the outputs. What packing froze gets ``requires_grad`` True again; what the user had
    frozen stays so. A packed checkpoint does not tell, so after loading one all parameters get ``requires_grad`` True.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``.
        ValueError: the model is not packed.
    """
    check_quantized(model, "unpack_octav")
    if not is_packed(model):
        raise ValueError(f"{type(model).__name__} is not packed; train it as it is")
    for layer in progress(packed_layers(model).values(), "unpacking weights"):
        layer.unpack()
    for module in model.modules():
        if isinstance(module, QuantizedAttention):
            module.arithmetic = SIMULATED
    release_packed(model)
    return model


def packed_to_load(model: nn.Module, frozen: Container[str]) -> dict[str, PackedWeight]:
    """Name -> empty packed weight of each layer of a converted model with a quantized weight, to load into.

    ``frozen``: the layers whose clips are frozen.
    """
    return {
        name: PackedWeight(quantizer, layer.weight, is_frozen=name in frozen)
        for name, (layer, quantizer) in quantized_weights(model).items()
    }


def quantized_weights(model: nn.Module) -> dict[str, tuple[Any, FakeQuantize]]:
    """Name -> layer with a quantized float weight, and its quantizer."""
    return {
        name: (layer, layer.weight_quantizer)
        for name, layer in layers_by_quantizer(model, FakeQuantize).items()
        if not isinstance(layer, PackedLayer)
    }


def packed_layers(model: nn.Module) -> dict[str, PackedLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedLayer)}


def _check_packable(name: str, layer: nn.Module) -> None:
    weight = own_parameters(layer).get("weight")
    if weight is None:
        raise ValueError(f"{name}: its weight is not a parameter (it is parametrized?); make it one before packing")
    shape = sharded_shape(weight)
    if shape is not None:
        raise ValueError(f"{name}: its weight of shape {shape} is sharded; save the model, and pack what is saved")
    if weight.is_meta:
        raise ValueError(
            f"{name}: its weight of shape {tuple(weight.shape)} is offloaded; load the whole model before packing it"
        )
