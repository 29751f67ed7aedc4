"""Freezing activation clips at their mean over calibration batches, and letting them follow the data again."""

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers.utils.logging import tqdm

from .._utils.forward_pass import Batch, check_batch, in_evaluation_mode, run_batch, without_trace
from .._utils.torch_private import tree_map
from ..conversion.modules import activation_quantizers, quantized_modules
from ..nn import ClipObserver, FakeQuantize, FrozenClips

logger = logging.getLogger(__name__)

Model = TypeVar("Model", bound=nn.Module)


def calibrate_octav(model: Model, batches: Iterable[Batch], *, progress_bar: bool = True) -> Model:
    """Freeze the clips of all activations (layer inputs and attention operands) at their mean over ``batches``.

    The model runs on each batch in evaluation mode, with dynamic clips. A frozen clip is the mean, in float64, of the
    dynamic clips of all calls on tensors that are not empty. An attention operand has one for each matmul that it is in
    within one forward pass of its module: DeBERTa multiplies content and positions in turn. An activation that may be
    signed or unsigned gets the unsigned grid if no tensor had a negative value. From then on, in training too, no
    statistics of activations are computed. Weights keep their dynamic clips.

    With ``activation_granularity``, clips per attention head or channel are means over all calls and batch elements
    (and heads, where a module merges them with the batch, as DeBERTa does). Tokens have no identity across batches, so
    an operand with a clip per token gets one for the whole tensor. ``coverage_report`` shows what each operand has.

    A Transformers model saves the clips in ``config.json``; ``from_pretrained`` brings them back. Where several
    processes train one model, give each the same batches, or, with ``sync_activation_clips``, each its own batches, as
    many as the others; the clips are then equal in all processes.

    Args:
        model: one that ``apply_octav`` quantized, or that contains such a model. Its mode, buffers and the random state
            are restored.
        batches: any iterable, such as a DataLoader. Each batch is a mapping of the forward's keyword arguments, a tuple
            or list of positional ones, or a single tensor; its tensors are moved to the model's device.
        progress_bar: whether to show one, where ``transformers.utils.logging`` allows it.

    Returns:
        ``model``. Activations that no batch reached stay dynamic, and a warning names them.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``, or ``batches`` or a batch has another type.
        ValueError: there is no batch or no quantized activation, or an attention module multiplied an operand more
            often in one forward pass than in another, or with another number of heads or channels. The model is then as
            it was.
    """
    if isinstance(batches, Mapping | Tensor) or not isinstance(batches, Iterable):
        raise TypeError(
            f"calibrate_octav takes an iterable of batches, such as a DataLoader, got {type(batches).__name__}; write "
            "[batch] for a single batch"
        )
    with calibrating(model), in_evaluation_mode(model), without_trace(model) as runnable:
        device, number = _device(model), 0
        for number, batch in enumerate(tqdm(batches, desc="calibrating", disable=not progress_bar), 1):
            check_batch(batch, f"calibrate_octav takes a list of batches, and each (here number {number}) is")
            run_batch(runnable, _on_device(batch, device))
        if number == 0:
            raise ValueError(
                "calibrate_octav got no batch, so there is nothing to compute clips from; pass at least one"
            )
    return model


@contextmanager
def calibrating(model: nn.Module) -> Iterator[None]:
    """``calibrate_octav`` around an evaluation loop of your own::

        model.eval()
        with torch.no_grad(), octav_hf.calibrating(model):
            for batch in batches:
                model.generate(**batch)

    Clips are dynamic inside and frozen at the end; after an error the model is as it was. Mode, gradients and random
    state are up to the loop.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``.
        ValueError: as ``calibrate_octav``; or nothing ran, or the model is being calibrated already.
    """
    operands = _activations(model, "calibrate_octav")
    if any(operand.quantizer.observer for operand in operands):
        raise ValueError(f"{type(model).__name__} is being calibrated already; end that before you begin anew")
    observers = [ClipObserver() for _ in operands]
    for operand, observer in zip(operands, observers, strict=True):
        operand.quantizer.observer = observer
    try:
        with torch.compiler.set_stance("force_eager"):  # observers would trigger a recompilation
            yield
    finally:
        for operand in operands:
            del operand.quantizer.observer
    for operand, observer in zip(operands, observers, strict=True):
        _check_call_counts(operand, observer.call_counts)
    frozen = [observer.mean() for observer in observers]
    if not any(frozen):
        raise ValueError(
            f"no activation of {type(model).__name__} was quantized during the calibration, so there are no clips to "
            "freeze; run this model in it, on batches that are not empty"
        )
    _freeze(operands, frozen)
    dynamic = [f"{operand.path} {operand.name}" for operand, clips in zip(operands, frozen, strict=True) if not clips]
    if dynamic:
        logger.warning(
            "%d of %d activations were not reached by the calibration, and their clips stay dynamic: %s",
            *(len(dynamic), len(operands), ", ".join(dynamic)),
        )


def uncalibrate_octav(model: Model) -> Model:
    """Undo ``calibrate_octav``: all clips follow the data again.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``.
        ValueError: no clip of the model is frozen.
    """
    operands = _activations(model, "uncalibrate_octav")
    if not any(operand.quantizer.frozen for operand in operands):
        raise ValueError(f"uncalibrate_octav: no clip of {type(model).__name__} is frozen")
    _freeze(operands, [None] * len(operands))
    return model


@dataclass(frozen=True)
class _Activation:
    """A quantized activation of a model."""

    root: nn.Module  # that has the config
    path: str  # of the module in the model
    name_in_config: str  # of the module
    name: str  # of the operand
    quantizer: FakeQuantize


def _activations(model: nn.Module, caller: str) -> list[_Activation]:
    """The quantized activations of all quantized models in ``model``."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{caller} takes a model (an nn.Module), got {type(model).__name__}")
    named = list(model.named_modules())
    # An inner one comes after those that it is in, and takes its modules from them.
    found: dict[FakeQuantize, _Activation] = {}
    for root_path, root in named:
        if "octav_config" in root.__dict__:
            for path, operand, quantizer in activation_quantizers(root):
                full = ".".join(filter(None, (root_path, path)))
                name = path
                found[quantizer] = _Activation(root, full, name, operand, quantizer)
    if found:
        return list(found.values())
    described = type(model).__name__
    if not any(True for _ in quantized_modules(model)):
        raise ValueError(f"{caller}: {described} is not quantized; call apply_octav(model, OctavConfig()) first")
    if not any(True for _ in activation_quantizers(model)):
        raise ValueError(f"{caller}: {described} has no quantized activations; set activation_bits in its OctavConfig")
    raise ValueError(
        f"{caller}: {described} is part of a model that apply_octav was called on, and the clips belong into the config"
        " of that; pass that model"
    )


def _check_call_counts(operand: _Activation, counts: set[int]) -> None:
    if len(counts) > 1:
        name = operand.name_in_config
        raise ValueError(
            f"{operand.path}: its forward multiplied the attention operand {operand.name} {min(counts)} times in one "
            f"pass and {max(counts)} times in another, so that clips cannot be frozen for each time; calibrate with "
            f"batches of one kind, or leave it out when you call apply_octav: module_overrides={{{name!r}: "
            "{'quantize_attention': False}}"
        )


def _freeze(operands: list[_Activation], frozen: list[FrozenClips | None]) -> None:
    """Give each activation its frozen clips, or none, and each model the record that says so."""
    for operand, new in zip(operands, frozen, strict=True):
        operand.quantizer.frozen = new


def _device(model: nn.Module) -> torch.device | None:
    """Where the model's first tensor is; ``None`` if that is nowhere, as for offloaded weights."""
    tensors = (tensor for tensors in (model.parameters(), model.buffers()) for tensor in tensors)
    return next((tensor.device for tensor in tensors if tensor.device.type != "meta"), None)


def _on_device(batch: Batch, device: torch.device | None) -> Batch:
    def move(leaf: Any) -> Any:
        return leaf.to(device) if isinstance(leaf, Tensor) and device is not None else leaf

    if isinstance(batch, Mapping):  # of any class, such as a tokenizer's
        return {name: tree_map(move, value) for name, value in batch.items()}
    return tree_map(move, batch)
