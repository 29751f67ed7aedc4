"""Find the quantized modules, layers and quantizers of a converted model."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .._utils.forward_pass import device_of
from .._utils.torch_private import own_parameters
from ..nn import FakeQuantize, QuantizedAttention, QuantizedLayer, WeightFakeQuantize

_MAX_NAMES = 3  # operands listed in a message


def quantized_modules(model: nn.Module) -> Iterator[QuantizedLayer | QuantizedAttention]:
    """The quantized layers and attention modules."""
    return (module for module in model.modules() if isinstance(module, QuantizedLayer | QuantizedAttention))


def is_quantized(model: nn.Module) -> bool:
    """Whether any module of the model is quantized."""
    return any(True for _ in quantized_modules(model))


def transformers_models(model: nn.Module) -> Iterator[PreTrainedModel]:
    """The outermost Transformers models in ``model``, which may be ``model`` itself."""
    if isinstance(model, PreTrainedModel):
        yield model
        return
    for child in model.children():
        yield from transformers_models(child)


def operand_quantizers(model: nn.Module) -> Iterator[tuple[str, str, FakeQuantize]]:
    """Full name of the module, operand and quantizer, for every quantized operand."""
    for path, module in model.named_modules():
        if isinstance(module, QuantizedLayer | QuantizedAttention):
            for operand, quantizer in module.operand_quantizers.items():
                if isinstance(quantizer, FakeQuantize):
                    yield path, operand, quantizer


def start_on_devices(model: nn.Module) -> None:
    """Start the quantizers' records of NaN on their modules' devices, before the model is compiled; they are on CPU."""
    if {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} <= {"cpu", "meta"}:
        return
    for module in quantized_modules(model):
        device = device_of(module)
        for quantizer in module.operand_quantizers.values():
            if device is not None and isinstance(quantizer, FakeQuantize):
                quantizer.start_on(torch.empty((), dtype=torch.float32, device=device))


def activation_quantizers(model: nn.Module) -> Iterator[tuple[str, str, FakeQuantize]]:
    """The same for every quantized activation."""
    return (found for found in operand_quantizers(model) if found[1] != "weight")


def check_no_groups(model: nn.Module, operation: str) -> None:
    """Raise ``NotImplementedError`` if an operand has clips for groups, which ``operation`` does not support."""
    found = [
        f"{path} {operand}"
        for path, operand, quantizer in operand_quantizers(model)
        if quantizer.active_groups is not None
    ]
    if found:
        names = ", ".join(found[:_MAX_NAMES]) + (f" and {len(found) - _MAX_NAMES} more" * (len(found) > _MAX_NAMES))
        raise NotImplementedError(
            f"{operation}: {names} have clips for groups, but integer matmuls with a scale per group are not "
            'supported; train with weight_granularity="channel" and activation_granularity "token" for inputs, '
            'queries, keys and probabilities, "channel" for values'
        )


def layers_by_quantizer(model: nn.Module, quantizer_class: type[FakeQuantize]) -> dict[str, Any]:
    """Full name -> layer, for layers whose weight quantizer is of this class."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, QuantizedLayer) and isinstance(module.weight_quantizer, quantizer_class)
    }


def layers_to_freeze(model: nn.Module) -> dict[str, Any]:
    """Full name -> layer, for layers whose weight clips can be frozen: not packed and not embeddings."""
    return layers_by_quantizer(model, WeightFakeQuantize)


def shared_weights(model: nn.Module) -> set[nn.Module]:
    """The modules whose ``weight`` is also a parameter of another module."""
    owners: dict[int, set[nn.Module]] = {}
    for module in model.modules():
        for parameter in own_parameters(module).values():
            if parameter is not None:
                owners.setdefault(id(parameter), set()).add(module)
    return {module for module in model.modules() if len(owners.get(id(own_parameters(module).get("weight")), ())) > 1}
