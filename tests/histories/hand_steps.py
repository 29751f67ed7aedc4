"""Steps that change a model's layers, weights, dtype or settings."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from octav_hf import OctavConfig, apply_octav, remove_octav
from octav_hf.nn import FakeQuantize, PackedLayer, QuantizedAttention, QuantizedLayer

from .check import Broken
from .models import ROWS
from .subject import Subject, action, has_adapters


@action(4, rows=[ROWS + 3, ROWS + 3, ROWS - 4, ROWS])
def resize(subject: Subject, rows: int = ROWS + 3) -> None:
    """``resize_token_embeddings``."""
    if "input_ids" not in subject.batch:
        raise ValueError("the history's model has no tokens")
    if isinstance(subject.model.get_output_embeddings(), ModulesToSaveWrapper):
        raise ValueError("the history's head is one of PEFT's, which Transformers cannot resize")
    subject.model.resize_token_embeddings(rows, mean_resizing=False)
    if subject.model.get_input_embeddings().weight.shape[0] != rows:
        raise Broken("resize_token_embeddings did nothing")


FIXED_HEADS = ("lm_head", "qa_outputs")
"""The heads whose number of outputs cannot be chosen."""


@action(4, like=[True, False])
def replace_head(subject: Subject, like: bool = True) -> None:
    """Replace the head with another ``nn.Linear``; ``like``: with as many outputs."""
    model, name = subject.model, subject.kind.head
    old = model.get_submodule(name)
    count = old.out_features if like or name in FIXED_HEADS else old.out_features + 3
    model.set_submodule(name, nn.Linear(old.in_features, count, bias=old.bias is not None).to(model.dtype))
    if name not in FIXED_HEADS:
        model.num_labels = model.config.num_labels = count


def _layers(model: nn.Module, kind: type[nn.Module] = QuantizedLayer) -> list[tuple[str, Any]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, kind)]


def _choose(model: nn.Module, index: int, kind: type[nn.Module] = QuantizedLayer) -> tuple[str, Any]:
    found = _layers(model, kind)
    if not found:
        raise ValueError(f"the history's model has no {kind.__name__}")
    return found[index % len(found)]


@action(2, layer=[0, 2, 5, -1, -2])
def float_layer(subject: Subject, layer: int = 0) -> None:
    """Replace a quantized layer with a float layer with the same weights."""
    name, old = _choose(subject.model, layer)
    if type(old.weight) is not nn.Parameter or "Linear" not in type(old).__name__:
        raise ValueError("the history's layer is packed, or not linear")
    new = nn.Linear(old.in_features, old.out_features, bias=old.bias is not None).to(subject.model.dtype)
    new.weight = old.weight
    new.bias = old.bias
    subject.model.set_submodule(name, new)


@action(1)
def float_part(subject: Subject) -> None:
    """Replace a quantized part of the model, including attention, with a float one."""
    name = subject.path("part")
    bare = remove_octav(copy.deepcopy(subject.model))
    subject.model.set_submodule(name, bare.get_submodule(name))


@action(1, layer=[0, 2, 5, -1])
def graft(subject: Subject, layer: int = 0) -> None:
    """Replace a quantized layer with one from another model that is quantized to 8 bits."""
    name, _ = _choose(subject.model, layer)
    other = subject.kind.make().to(subject.model.dtype)
    apply_octav(other, OctavConfig(weight_bits=8, activation_bits=8, embedding_bits=8))
    if has_adapters(subject.model):
        raise ValueError("the history's model has adapters")
    new = other.get_submodule(name)
    if new.weight.shape != subject.model.get_submodule(name).weight.shape:
        raise ValueError("the history's layer has another shape now")
    subject.model.set_submodule(name, new)


@action(1)
def replace_embeddings(subject: Subject) -> None:
    """``set_input_embeddings``, of a float table."""
    old = subject.model.get_input_embeddings()
    if not isinstance(old, nn.Embedding):
        raise ValueError("the history's model has no tokens")
    if isinstance(subject.model.get_output_embeddings(), ModulesToSaveWrapper):
        raise ValueError("the history's head is one of PEFT's, which Transformers cannot tie")
    new = nn.Embedding(old.num_embeddings, old.embedding_dim, old.padding_idx).to(subject.model.dtype)
    subject.model.set_input_embeddings(new)
    subject.model.tie_weights()


@action(1, first=[True, False])
def drop_layer(subject: Subject, first: bool = True) -> None:
    """Leave out one of two layers: if it is the first, the other's name changes."""
    layers = getattr(getattr(subject.kind.base(subject.model), "encoder", None), "layer", ())
    if len(layers) != 2:
        raise ValueError("the history's model has not two layers")
    subject.model.base_model.encoder.layer = layers[1:] if first else layers[:1]
    subject.model.config.num_hidden_layers = 1


_SETTINGS = [("num_bits", 8), ("num_bits", 3), ("clip", "max"), ("gradient_estimator", "ste"), ("signed", True)]


@action(2, operand=["weight", "input", "query"], layer=[0, 2, 5, -1], setting=_SETTINGS)
def change_quantizer(
    subject: Subject, operand: str = "weight", layer: int = 0, setting: tuple[str, Any] = _SETTINGS[0]
) -> None:
    """Change an attribute of a quantizer."""
    quantizer = _quantizer(subject, operand, layer)
    setattr(quantizer, *setting)


@action(2, operand=["weight", "input", "query"], layer=[0, 2, 5, -1], new=["identity", "identity", "max"])
def replace_quantizer(subject: Subject, operand: str = "weight", layer: int = 0, new: str = "identity") -> None:
    """Replace a quantizer with another one or with none."""
    _quantizer(subject, operand, layer)
    _, owner = _owner(subject, operand, layer)
    made = nn.Identity() if new == "identity" else FakeQuantize(6, clip="max", gradient_estimator="pwl")
    setattr(owner, f"{operand}_quantizer", made)


def _owner(subject: Subject, operand: str, layer: int) -> tuple[str, Any]:
    return _choose(subject.model, layer, QuantizedAttention if operand == "query" else QuantizedLayer)


def _quantizer(subject: Subject, operand: str, layer: int) -> FakeQuantize:
    """A quantizer with dynamic clips; frozen and packed ones are left out."""
    _, owner = _owner(subject, operand, layer)
    quantizer = getattr(owner, f"{operand}_quantizer", None)
    if not isinstance(quantizer, FakeQuantize) or quantizer.is_frozen or list(quantizer.buffers()):
        raise ValueError("the history's operand is in float, frozen or packed")
    return quantizer


@action(3, dtype=["bfloat16", "float64", "half()"])
def cast(subject: Subject, dtype: str = "bfloat16") -> None:
    """Change the dtype, except of buffers that are not saved, such as Llama's frequencies."""
    if subject.model._keep_in_fp32_modules:
        raise ValueError("the history's model is loaded with some parameters in float32, whatever they were")
    cast_saved(subject.model, torch.float16 if dtype == "half()" else getattr(torch, dtype), by_half=dtype == "half()")


def cast_saved(model: nn.Module, dtype: torch.dtype, *, by_half: bool = False) -> None:
    """Cast what is in the model's state dict."""
    saved = model.state_dict().keys()
    kept = {name: buffer.clone() for name, buffer in model.named_buffers() if name not in saved}
    if by_half:
        model.half()
    else:
        model.to(dtype)
    for name, buffer in kept.items():
        model.get_buffer(name).data = buffer


@action(4, steps=[1, 3])
def train(subject: Subject, steps: int = 1) -> None:
    """Gradient descent, in training mode."""
    modes = [(module, module.training) for module in subject.outer.modules()]
    batch = subject.batch
    if "pixel_values" in batch:
        batch["pixel_values"] = batch["pixel_values"].to(subject.model.dtype)
    subject.model.train()
    try:
        parameters = [p for p in subject.model.parameters() if p.requires_grad]
        for _ in range(steps):
            result = subject.model(**batch)
            if not parameters:
                raise ValueError("the history's model has nothing to train")
            gradients = torch.autograd.grad(result[0].float().square().mean(), parameters, allow_unused=True)
            with torch.no_grad():
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    if gradient is not None:
                        parameter -= 0.1 * gradient / gradient.norm().clamp(min=1)
    finally:
        for module, mode in modes:
            module.training = mode


@action(1, mode=[True, False])
def training_mode(subject: Subject, mode: bool = True) -> None:
    """``train`` or ``eval``, of what is around the model."""
    subject.outer.train(mode)


@action(1, which=["base", "all", "biases"], on=[False, True])
def requires_grad(subject: Subject, which: str = "base", on: bool = False) -> None:
    """Freeze or unfreeze some parameters."""
    module = subject.model.base_model if which == "base" else subject.model
    if on and which != "biases" and any(isinstance(layer, PackedLayer) for layer in module.modules()):
        try:  # torch goes through the parameters one by one, up to the first packed weight
            copy.deepcopy(module).requires_grad_(True)
        except RuntimeError:
            return
        raise Broken("packed weights became trainable")
    for name, parameter in module.named_parameters():
        if parameter.is_floating_point() and (which != "biases" or name.endswith("bias")):
            parameter.requires_grad_(on)


_WRITES: dict[str, Callable[[Tensor], Any]] = {
    "mul_": lambda weight: weight.mul_(0.5),
    "data.copy_": lambda weight: weight.data.copy_(torch.ones(weight.shape)),
    "data =": lambda weight: setattr(weight, "data", torch.ones_like(weight)),
    "init": lambda weight: nn.init.ones_(weight),
    "[0] =": lambda weight: weight.__setitem__(0, 0.25),
    "out=": lambda weight: torch.mul(weight, 0.5, out=weight),
}


@action(3, layer=[0, 2, 5, -1], how=[*_WRITES, "assign"])
def write(subject: Subject, layer: int = 0, how: str = "mul_") -> None:
    """Write into a weight, which must take effect or raise an error."""
    name, module = _choose(subject.model, layer)
    if how == "assign":
        module.weight = nn.Parameter(torch.ones_like(module.weight))
        if not bool((module.weight == 1).all()):
            raise Broken("the assignment of a weight is lost", name)
        return
    with torch.no_grad():
        expected = module.weight.detach().clone() + 0
        _WRITES[how](expected)
        before = module.weight.detach() + 0
        _WRITES[how](module.weight)
        if torch.equal(module.weight.detach() + 0, before) and not torch.equal(expected, before):
            raise Broken(f"a write into a weight is lost ({how})", name)
