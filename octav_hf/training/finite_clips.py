"""The error for NaN and Inf on a GPU and in compiled models, where clipping rules cannot raise it."""

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .._utils.transformers_compat import add_trainer_callback
from ..nn import FakeQuantize
from ..nn.nan_flag import met_nan


def check_finite(model: nn.Module) -> None:
    """Raise an error if a dynamic clip of ``model`` was NaN since the last call; this synchronizes with the device.

    A tensor with NaN or Inf has no clip. On the CPU, unless the model is compiled, the forward pass raises an error at
    once. Elsewhere, this check would make each quantizer synchronize; instead, its clip and output become NaN, which is
    recorded on the device. Trainer and ``save_pretrained`` call this function; in your own training loop, call it where
    you read the loss. It reads one number per quantizer, with one read per device.

    Frozen clips are not recorded, because they do not depend on the data, and neither are clips of the replicas that
    ``nn.DataParallel`` creates.

    Raises:
        ValueError: with the name of the first such quantizer in the order of ``model.modules()``. The record is then
            cleared.
    """
    _check(_quantizers(model), "")


def _quantizers(model: nn.Module) -> dict[str, FakeQuantize]:
    """Path -> quantizer, in the order of the model's modules."""
    return {path: module for path, module in model.named_modules() if isinstance(module, FakeQuantize)}


def _check(quantizers: Mapping[str, FakeQuantize], when: str) -> None:
    """``check_finite`` for quantizers by path; ``when`` follows "held NaN or Inf" in the message."""
    found = met_nan(list(quantizers.values()))
    if not any(found):
        return
    names = [
        quantizer.name or path for (path, quantizer), is_nan in zip(quantizers.items(), found, strict=True) if is_nan
    ]
    for quantizer in quantizers.values():
        quantizer.forget()
    others = "" if len(names) == 1 else f", the first of {len(names)} such operands in the model's order"
    raise ValueError(
        f"{names[0]}: this operand held NaN or Inf{when}, so it has no clipping scalar{others}; find where they arise "
        "(float16 overflow, too high a learning rate, a damaged checkpoint, a bad batch). On the CPU without "
        "compilation, the forward pass raises the error at the first such operand and reports how many values it has"
    )


class FiniteClips(TrainerCallback):
    """Calls ``check_finite`` where Trainer synchronizes with the device anyway. Every Trainer gets this callback.

    With ``logging_nan_inf_filter``, which silently replaces a NaN loss, Trainer synchronizes in each step; otherwise
    when it logs, evaluates and saves, and at the end. The check before an optimizer step keeps NaN out of the weights.
    """

    def __init__(self) -> None:
        self._quantizers: dict[str, FakeQuantize] = {}
        self._finite_until = 0  # last step known to be finite

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._quantizers = _quantizers(kwargs["model"])
        self._finite_until = state.global_step

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.logging_nan_inf_filter:
            self._check(state.global_step + 1)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if control.should_log or control.should_evaluate or control.should_save:
            self._check(state.global_step)

    on_epoch_end = on_step_end

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._check(state.global_step)
        self._quantizers = {}

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        _check(_quantizers(kwargs["model"]), " in evaluation")

    def on_predict(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: Any, **kwargs: Any
    ) -> None:
        self.on_evaluate(args, state, control, **kwargs)

    def _check(self, step: int) -> None:
        first = min(self._finite_until + 1, step)
        steps = f"step {step} of the training"
        if first < step:  # the first of these steps has made the weights NaN
            steps = f"a step from {first} to {step} of the training (later steps got it from the weights)"
        _check(self._quantizers, f" in {steps}")
        self._finite_until = step


add_trainer_callback(FiniteClips)
