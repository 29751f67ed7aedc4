"""``pack_octav`` and ``unpack_octav``: convert weights to integers and scales, and back."""

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
    """Store the quantized weights as packed integers and one scale per row or group, in place.

    The outputs stay the same, bit for bit: a packed layer dequantizes its weight whenever it is used. The only
    exceptions are convolutions in ``channels_last``, where torch may choose another kernel for the packed weight, which
    is contiguous; and quantized embeddings. If the model reads the ``weight`` of one without calling the module, it was
    in float and is quantized now. And the clip of a row may change by float32 rounding (1e-7): before packing it is
    computed among the rows that are looked up, here among all, and only 4096 elements or more use the C++ kernel.
    ``save_pretrained`` and ``push_to_hub`` of a Transformers model then write the packed form, which
    ``from_pretrained`` loads. Packed weights are read-only: writing to one, replacing it or making it trainable raises
    ``RuntimeError``. Other parameters are frozen (``requires_grad=False``). To continue training, call
    ``unpack_octav``; adapters on the packed model can be trained without it.

    A weight that several modules share, such as a language-model head and the token embeddings, stays in floating point
    and is quantized when used, as in training; a warning names it. Learned clips of activations become static and are
    no longer learned, also after ``unpack_octav``.

    Args:
        model: quantized by ``apply_octav``.
        embedding_bits: 2 to 8 also quantizes and packs the embedding tables of a model that was trained without
            ``OctavConfig.embedding_bits``, with one scale per row. This changes the outputs slightly.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``.
        ValueError: the model is not quantized by ``apply_octav``, or already packed; a weight holds NaN or Inf, or is
            sharded; ``embedding_bits`` contradicts the config, or a table is shared. The model is then unchanged.
    """
    check_quantized(model, "pack_octav")
    requantize_output_embeddings(model)
    if is_packed(model):
        raise ValueError(f"{type(model).__name__} is already packed; save it as it is")
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
                f"{table.name}: other modules share this table of {table.module.num_embeddings} rows, so it must stay "
                "in floating point; leave embedding_bits out"
            )
    unshared = progress([pair for pair in quantized.values() if pair[0] not in shared], "packing weights")
    packed = [(layer, PackedWeight.pack(quantizer, layer.weight)) for layer, quantizer in unshared]
    if not packed:
        raise ValueError(f"{type(model).__name__} has no quantized weight that is not shared, so nothing can be packed")
    for table in tables:
        table.convert()
    if tables and "octav_config" in model.__dict__:
        model.octav_config = replace(model.octav_config, embedding_bits=embedding_bits)  # type: ignore[type-var]
    for layer, weight in packed:
        PackedLayer.pack(layer, weight)
    for _, _, quantizer in activation_quantizers(model):
        if quantizer.frozen is not None:
            quantizer.freeze(quantizer.frozen)  # makes learned clips static
    freeze_packed(model)
    left = [name for name, (layer, _) in quantized.items() if layer in shared]
    if left:
        logger.warning(
            "Several modules share these weights, so they are stored in floating point and quantized when used: %s",
            ", ".join(left),
        )
    return model


def unpack_octav(model: Model) -> Model:
    """Undo ``pack_octav`` in place, for training: weights become parameters with the dequantized values.

    Unless ``calibrate_octav`` froze the clips, they are recomputed from these values, so clips and outputs differ
    slightly from those before packing. Parameters that packing froze get ``requires_grad=True`` again; parameters that
    the user had frozen stay frozen. A packed checkpoint does not record this, so after loading one, all parameters get
    ``requires_grad=True``.

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
    """Name -> empty packed weight to load into, for each layer of a converted model with a quantized weight.

    Args:
        frozen: names of the layers whose clips are frozen.
    """
    return {
        name: PackedWeight(quantizer, layer.weight, is_frozen=name in frozen)
        for name, (layer, quantizer) in quantized_weights(model).items()
    }


def quantized_weights(model: nn.Module) -> dict[str, tuple[Any, FakeQuantize]]:
    """Name -> layer and weight quantizer, for layers with a quantized weight that is not packed."""
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
        raise ValueError(
            f"{name}: its weight is not a parameter (is it parametrized?); remove the parametrization before packing"
        )
    shape = sharded_shape(weight)
    if shape is not None:
        raise ValueError(f"{name}: its weight of shape {shape} is sharded; save the model, then load and pack it")
    if weight.is_meta:
        raise ValueError(
            f"{name}: its weight of shape {tuple(weight.shape)} is offloaded; load the model without a device_map "
            "before packing it"
        )
