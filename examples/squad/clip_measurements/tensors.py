"""The tensors whose clips are measured: the inputs of a model's quantizers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from octav_hf.functional.rows import Dim
from octav_hf.nn import FakeQuantize, PackedLayer, QuantizedEmbedding


@dataclass(frozen=True)
class SeenTensor:
    """The input of a quantizer.

    Attributes:
        name: name of the operand in the model.
        kind: `weight`, `input`, `query`, `key`, `probabilities`, `value` or `embedding`.
        values: floating point, any shape.
        signed: whether the grid is signed.
        dim: dimensions that share a clip; None for one clip for the whole tensor.
    """

    name: str
    kind: str
    values: Tensor
    signed: bool
    dim: Dim


def seen_tensors(model: nn.Module, batch: Mapping[str, Tensor]) -> list[SeenTensor]:
    """The inputs of the model's quantizers in one forward pass in its current mode, in the order of the calls.

    Layers that read the same tensor, such as query, key and value projections, quantize it once; it is listed under the
    name of the first of them. If a layer runs several times, each of its inputs is listed, and its weight once.

    Raises:
        ValueError: no tensor of the model is quantized, or its weights are packed.
    """
    parents = dict(model.named_modules())
    packed = [name for name, module in parents.items() if isinstance(module, PackedLayer)]
    if packed:
        raise ValueError(
            f"{packed[0]} is packed: its weight is already quantized, and the original weight is not stored. Measure "
            "the training form, which save_pretrained wrote before pack_octav."
        )
    quantizers = {name: module for name, module in parents.items() if isinstance(module, FakeQuantize)}
    if not quantizers:
        raise ValueError(
            f"{type(model).__name__} has no quantized tensor, so there are no clips to measure: call apply_octav, or "
            "quantize weights or activations (weight_bits, activation_bits) in its quantization_config."
        )
    seen: list[SeenTensor] = []
    calls: dict[str, list[Tensor]] = {name: [] for name in quantizers}

    def note(name: str, quantizer: FakeQuantize, x: Tensor, known: Tensor | None = None) -> None:
        owner, _, attribute = name.rpartition(".")
        operand = attribute.removesuffix("_quantizer")
        kind = "embedding" if isinstance(parents[owner], QuantizedEmbedding) else operand
        if known is not None or any(x is before for before in calls[name]):
            return
        calls[name].append(x)
        label = f"{owner} {operand}" if len(calls[name]) == 1 else f"{owner} {operand}, use {len(calls[name])}"
        frozen = quantizer.active_frozen_clips
        signed = bool(quantizer.is_signed(x)) if frozen is None else frozen.signed
        seen.append(SeenTensor(label, kind, x.detach(), signed, quantizer.dim))

    handles = [
        quantizer.register_forward_pre_hook(
            lambda module, args, kwargs, name=name: note(name, module, args[0], kwargs.get("known")), with_kwargs=True
        )
        for name, quantizer in quantizers.items()
    ]
    try:
        with torch.no_grad():
            model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    return seen
