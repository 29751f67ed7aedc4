"""Observing the clips of activations, and freezing them at their mean."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from ..conversion.modules import activation_quantizers
from ..conversion.record import check_quantized
from ..nn import ClipObserver, FakeQuantize, FrozenClips

logger = logging.getLogger(__name__)


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
    operands = _activations(model)
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
    frozen = [_mean(operand, observer) for operand, observer in zip(operands, observers, strict=True)]
    if all(clips is None for clips in frozen):
        raise ValueError(
            f"no activation of {type(model).__name__} was quantized during the calibration, so there are no clips to "
            "freeze; run this model in it, on batches that are not empty"
        )
    dynamic = []
    for operand, clips in zip(operands, frozen, strict=True):
        if clips is None:
            operand.quantizer.unfreeze()
            dynamic.append(f"{operand.path} {operand.name}")
        else:
            operand.quantizer.freeze(clips)
    if dynamic:
        logger.warning(
            "%d of %d activations were not reached by the calibration, and their clips stay dynamic: %s",
            *(len(dynamic), len(operands), ", ".join(dynamic)),
        )
    warn_of_adapters(model)


def warn_of_adapters(model: nn.Module) -> None:
    """Warn if ``model``, frozen now, has PEFT's adapters, which are saved without the model around them."""
    if any(getattr(module, "peft_config", None) for module in model.modules()):
        logger.warning(
            "%s has adapters, whose checkpoints have no frozen clips of the base model: resumed or loaded, it has "
            "those of the base model then. Freeze clips before adding adapters, and save the base model so; or merge "
            "the adapters, and save the result.",
            type(model).__name__,
        )


@dataclass(frozen=True)
class _Activation:
    """A quantized activation of a model."""

    path: str  # of the module
    name: str  # of the operand
    quantizer: FakeQuantize


def _activations(model: nn.Module) -> list[_Activation]:
    """The quantized activations of ``model``; the errors of ``calibrate_octav`` without one."""
    check_quantized(model, "calibrate_octav")
    found = {quantizer: _Activation(path, name, quantizer) for path, name, quantizer in activation_quantizers(model)}
    if not found:
        raise ValueError(
            f"calibrate_octav: {type(model).__name__} has no quantized activations; set activation_bits in its "
            "OctavConfig"
        )
    return list(found.values())


def _check_call_counts(operand: _Activation, counts: set[int]) -> None:
    if len(counts) > 1:
        name = operand.quantizer.name.removesuffix(f" {operand.name}")
        raise ValueError(
            f"{operand.path}: its forward multiplied the attention operand {operand.name} {min(counts)} times in one "
            f"pass and {max(counts)} times in another, so that clips cannot be frozen for each time; calibrate with "
            f"batches of one kind, or leave it out when you call apply_octav: module_overrides={{{name!r}: "
            "{'quantize_attention': False}}"
        )


def _mean(operand: _Activation, observer: ClipObserver) -> FrozenClips | None:
    try:
        return observer.mean()
    except ValueError as error:
        raise ValueError(
            f"{operand.path}: the attention operand {operand.name} has {error}, which cannot be frozen together; give "
            'it activation_granularity "tensor"'
        ) from error
