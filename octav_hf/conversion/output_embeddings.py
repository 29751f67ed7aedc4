"""Quantize the head again after ``resize_token_embeddings`` has replaced it with a new float layer."""

import copy
from typing import Any

from torch import nn

from ..nn import QUANTIZED_LAYERS, FakeQuantize, PackedLayer, PackedWeight, QuantizedLayer
from .modules import shared_weights


class RequantizeOutputEmbeddings:
    """A forward pre-hook of a Transformers model with a quantized head; also called after resizing and before saving.

    A float layer that has replaced the head gets the quantizers of the last quantized head, and is frozen and packed
    like it.
    """

    _head: QuantizedLayer  # the last quantized head

    def __call__(self, model: Any, args: Any = ()) -> None:
        head = model.get_output_embeddings()
        if isinstance(head, QuantizedLayer):
            self._head = head
        elif type(head) is self._head.float_class:
            self._quantize(model, head)

    def _quantize(self, model: nn.Module, head: Any) -> None:
        quantized_class, weight = QUANTIZED_LAYERS[type(head)], self._head.weight_quantizer
        quantizers = {
            operand: copy.deepcopy(getattr(self._head, f"{operand}_quantizer")) for operand in self._head.operands
        }
        if isinstance(weight, FakeQuantize):
            quantizers["weight"] = quantized_class.weight_quantizer_class(**weight.init_kwargs)
        quantized_class.convert(head, quantizers)
        is_packed, self._head = isinstance(self._head, PackedLayer), head
        if head in shared_weights(model) or not isinstance(weight, FakeQuantize):
            return
        if weight.is_frozen:
            head.weight_quantizer.freeze_at(head.weight)
        if is_packed:
            PackedLayer.pack(head, PackedWeight.pack(head.weight_quantizer, head.weight))
            head.requires_grad_(False)


def attach(model: Any) -> None:
    """Register the hook on a Transformers model, if its head is quantized."""
    if isinstance(model.get_output_embeddings(), QuantizedLayer):
        hook = RequantizeOutputEmbeddings()
        hook(model)
        model.__dict__["octav_output_embeddings"] = hook, model.register_forward_pre_hook(hook)


def detach(module: nn.Module) -> None:
    """Undo ``attach``."""
    if "octav_output_embeddings" in module.__dict__:
        module.__dict__.pop("octav_output_embeddings")[1].remove()


def requantize_output_embeddings(model: nn.Module) -> None:
    """Call the hooks of all Transformers models in ``model``; used after resizing, before packing and saving."""
    for module in model.modules():
        if "octav_output_embeddings" in module.__dict__:
            module.__dict__["octav_output_embeddings"][0](module)
