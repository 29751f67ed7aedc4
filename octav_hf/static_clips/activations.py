"""Observe the clips of activations, and freeze them."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

from .._utils.escaping import shown
from .._utils.sharded_weights import sharded_shape
from ..conversion.modules import activation_quantizers
from ..conversion.record import check_quantized, is_packed
from ..conversion.request import to_set
from ..nn import ClipObserver, FakeQuantize, FrozenClips, HistogramObserver, MeanObserver

logger = logging.getLogger(__name__)


OBSERVERS: dict[str, type[ClipObserver]] = {"mean": MeanObserver, "histogram": HistogramObserver}
"""Name -> observer: static clips are the mean of dynamic clips, or are computed from the histogram of all calls."""


@contextmanager
def calibrating(model: nn.Module, *, observer: str = "mean", learned: bool = False) -> Iterator[None]:
    """``calibrate_octav`` as a context around your own evaluation loop::

        model.eval()
        with torch.no_grad(), octav_hf.calibrating(model):
            for batch in batches:
                model.generate(**batch)

    Clips are dynamic inside the context and frozen at its end; after an error the model is unchanged. Set mode,
    gradients and random state yourself.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``.
        ValueError: as ``calibrate_octav``; or nothing ran, or the model is already being calibrated; or ``observer`` is
            ``"histogram"`` and an operand may be on an asymmetric grid, for which the loop would have to run twice.
    """
    calibration = Calibration(model, observer, learned)
    for operand, found in calibration.observers.items():
        if found.may_need_another_pass:
            raise ValueError(
                f"{operand.path}: the histogram of an operand that may be on an asymmetric grid needs two passes over "
                "the batches, but calibrating(model) sees one; write calibrate_octav(model, batches, "
                'observer="histogram"), or observer="mean"'
            )
    with calibration.observing():
        yield
    calibration.freeze()


class Calibration:
    """Observes the activations of a model while it runs, then freezes their clips.

    Raises:
        TypeError, ValueError: as ``calibrating``.
    """

    def __init__(self, model: nn.Module, observer: str, learned: bool):
        self._model, self._learned, operands = model, learned, _activations(model)
        check_observer(observer)
        if learned:
            _check_trainable(model)
        if any(operand.quantizer.observer for operand in operands):
            raise ValueError(
                f"{type(model).__name__} is already being calibrated; finish that calibration before you start another"
            )
        self.observers = {operand: OBSERVERS[observer](operand.quantizer) for operand in operands}

    @property
    def may_need_another_pass(self) -> bool:
        """Whether ``needs_another_pass`` may turn out true."""
        return any(observer.may_need_another_pass for observer in self.observers.values())

    def needs_another_pass(self) -> bool:
        """Whether the model has to run on the same batches again."""
        answers = [observer.needs_another_pass() for observer in self.observers.values()]  # asking prepares the pass
        return any(answers)

    @contextmanager
    def observing(self) -> Iterator[None]:
        """Context in which clips are dynamic and observed."""
        for operand, observer in self.observers.items():
            operand.quantizer.observer = observer
        try:
            with torch.compiler.set_stance("force_eager"):  # observers would trigger a recompilation
                yield
        finally:
            for operand in self.observers:
                del operand.quantizer.observer

    @torch.inference_mode(False)
    def freeze(self) -> None:
        """Freeze the clips of all operands; after an error, of none."""
        for operand, observer in self.observers.items():
            _check_call_counts(operand, observer.call_counts)
        frozen = {operand: _frozen(operand, observer) for operand, observer in self.observers.items()}
        if all(clips is None for clips in frozen.values()):
            raise ValueError(
                f"no activation of {type(self._model).__name__} was quantized during the calibration, so there are no "
                "clips to freeze; run this model during the calibration, on batches that are not empty"
            )
        dynamic = []
        for operand, clips in frozen.items():
            if clips is None:
                operand.quantizer.unfreeze()
                dynamic.append(f"{operand.path} {operand.name}")
            else:
                operand.quantizer.freeze(clips.learning if self._learned else clips)
        if dynamic:
            logger.warning(
                "%d of %d activations were not reached by the calibration, so their clips stay dynamic: %s",
                *(len(dynamic), len(frozen), ", ".join(dynamic)),
            )
        known = {operand: clips for operand, clips in frozen.items() if clips is not None}
        zero = [f"{operand.path} {operand.name}" for operand, each in known.items() if not bool(each.clips.any())]
        if zero:
            logger.warning(
                "These activations were all 0 in the calibration, so their frozen clip is 0 and they will be quantized "
                "to 0: %s. Calibrate with batches in which they are not.",
                ", ".join(zero),
            )
        warn_of_adapters(self._model)


def check_observer(observer: str) -> None:
    """Raise ``ValueError`` for an unknown observer."""
    if observer not in OBSERVERS:
        known = " or ".join(f'"{name}"' for name in OBSERVERS)
        raise ValueError(f"observer must be {known}, got {shown(observer)}")


def warn_of_adapters(model: nn.Module) -> None:
    """Warn if ``model``, whose clips have been frozen, has PEFT adapters, which are saved without the base model."""
    if _has_adapters(model):
        logger.warning(
            "%s has adapters, and their checkpoints do not contain the frozen clips of the base model, so loading or "
            "resuming one restores the base model's old clips. Freeze clips and save the base model before you add "
            "adapters; or merge the adapters and save the result.",
            type(model).__name__,
        )


def _has_adapters(model: nn.Module) -> bool:
    return any(getattr(module, "peft_config", None) for module in model.modules())


def _check_trainable(model: nn.Module) -> None:
    """Raise ``ValueError`` if new parameters of ``model`` would not be trained or saved."""
    kind = f"learned=True: {type(model).__name__}"
    if is_packed(model):
        raise ValueError(f"{kind} is packed, but a packed model cannot be trained; call unpack_octav(model) first")
    if _has_adapters(model):
        raise ValueError(
            f"{kind} has adapters, whose checkpoints do not contain clips of the base model, so learned clips would be "
            "lost; leave learned=True out, or train the whole model before you add adapters"
        )
    wrapped = any(isinstance(module, DistributedDataParallel | FullyShardedDataParallel) for module in model.modules())
    if wrapped or any(sharded_shape(parameter) is not None for parameter in model.parameters()):
        raise ValueError(
            f"{kind} is wrapped in DistributedDataParallel or sharded, and the gradients of parameters added later "
            "are not averaged over the processes; calibrate the model before you wrap or shard it"
        )


@dataclass(frozen=True)
class _Activation:
    """A quantized activation of a model."""

    path: str  # of the module
    name: str  # of the operand
    quantizer: FakeQuantize


def _activations(model: nn.Module) -> list[_Activation]:
    """The quantized activations of ``model``; raises the errors of ``calibrate_octav`` if there are none."""
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
            f"{operand.path}: its forward used the attention operand {operand.name} in {min(counts)} matmul(s) in one "
            f"pass and in {max(counts)} in another, so there is no fixed number of clips to freeze; calibrate with "
            "batches of one kind, or leave its matmuls in float in apply_octav: "
            f"{to_set(name, 'quantize_attention', False)}"
        )


def _frozen(operand: _Activation, observer: ClipObserver) -> FrozenClips | None:
    try:
        frozen = observer.frozen()
    except ValueError as error:
        raise ValueError(
            f"{operand.path}: the attention operand {operand.name} has {error}; these cannot be frozen together, so "
            'set its activation_granularity to "tensor"'
        ) from error
    if frozen is not None and not bool(frozen.clips.isfinite().all()):
        raise ValueError(f"{operand.path}: {operand.name} held NaN or Inf in the calibration, so it has no clip")
    return frozen
