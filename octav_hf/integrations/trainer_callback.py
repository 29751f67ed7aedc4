"""``OctavCallback``: what quantization does in training, in Trainer's logs."""

from collections.abc import Set
from contextlib import ExitStack
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from .._utils.torch_private import own_parameters, uncompiled
from .._utils.transformers_compat import call_before_others
from ..analysis.code_changes import CodeChanges
from ..analysis.operand_statistics import OperandStatisticsHooks
from ..analysis.training_figures import per_layer, summary
from ..analysis.training_warnings import TrainingWarnings
from ..conversion.modules import layers_to_freeze
from ..conversion.record import check_quantized

logger = logging.get_logger(__name__)


class OctavCallback(TrainerCallback):
    """Adds what quantization does to each of Trainer's training logs, and warns of quantizers that go wrong::

        trainer = Trainer(model=apply_octav(model, OctavConfig()), callbacks=[octav_hf.OctavCallback()], ...)

    What reports the loss (TensorBoard, Weights & Biases, Trackio, the console and ``trainer_state.json``) then reports
    these, under ``octav/``. Over weights (``weight_``) and over activations (``activation_``), each operand counting
    alike:

    - ``sqnr_db_mean``, ``sqnr_db_min``: signal-to-quantization-noise ratio, ``10 log10(sum(x²) / sum((x - Q(x))²))``;
    - ``clipped_share_mean``, ``clipped_share_max``: share of the elements beyond the clip;
    - ``clip_ratio_mean``, ``clip_ratio_min``, ``clip_ratio_max``: mean clip of an operand, over that in the first step;
    - ``weight_changed_codes_mean``, ``weight_changed_codes_min``: share of a layer's weights whose integer is another
      than at the log before, or in the first step.

    Which operand has a minimum or maximum is text, so that it is in ``state.log_history`` and ``trainer_state.json``
    alone, under the same name with ``_operand``.

    The values are those of the first forward pass of the step that is logged, on rank 0 of several; all ranks measure,
    so that they stay in step. Other steps, except the first, cost nothing. The step that is measured runs without
    ``torch.compile``. Its number follows from ``logging_strategy``, ``logging_steps`` and ``logging_first_step``; a log
    that another callback causes in another step lacks the values, with a warning. A resumed run compares with its own
    first step. On each rank one byte is kept for each quantized weight.

    Each warning comes once for an operand, through Transformers' logger. It names the operand and what to do:

    - A clip **collapsed** or **exploded**: it is less than 1 / ``clip_factor`` of its first value, or more than
      ``clip_factor`` times it.
    - An operand is **dead**: all its values are the same, or its SQNR is below ``dead_sqnr_db``.
    - The codes of a layer are **still**: its weight has a gradient and a learning rate above 0, and no code of it
      changed in ``still_logs`` logs in a row, although at the share of all layers 10 or more would have, or none in the
      whole model.

    Args:
        per_layer: also log each operand's ``octav/<module>/<operand>/sqnr_db``, ``/clip`` and ``/clipped_share``, and
            ``/changed_codes`` of weights; the console shows these too.
        clip_factor: above 1.
        dead_sqnr_db: at 0 dB the error is as large as the signal, and zeros instead of the operand would do as well.
        still_logs: at least 1.

    Raises:
        ValueError: an argument is out of range; or, when training begins, the model is not quantized.
        NotImplementedError: when training begins, one process uses several devices (``nn.DataParallel``).
    """

    def __init__(
        self, *, per_layer: bool = False, clip_factor: float = 10.0, dead_sqnr_db: float = 1.0, still_logs: int = 3
    ):
        if not clip_factor > 1:
            raise ValueError(f"OctavCallback: clip_factor must be above 1, got {clip_factor!r}")
        if not still_logs >= 1:
            raise ValueError(f"OctavCallback: still_logs must be at least 1, got {still_logs!r}")
        self._per_layer = per_layer
        self._thresholds = clip_factor, dead_sqnr_db, still_logs
        self._entered = ExitStack()
        self._ends = ExitStack()  # removes the hook that ends a measurement
        self._warned_of_log = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        check_quantized(kwargs["model"], "OctavCallback")
        self._end()  # of a training that failed
        if args.n_gpu > 1:
            raise NotImplementedError(
                f"OctavCallback: this process uses {args.n_gpu} devices (nn.DataParallel), whose copies of the model "
                "cannot be measured together; start one process for each with torchrun or accelerate launch"
            )
        if args.logging_strategy == "no":
            logger.warning('OctavCallback has nothing to add to: logging_strategy is "no"; set "steps" or "epoch"')
        self._changes = CodeChanges(kwargs["model"])
        self._warnings = TrainingWarnings(*self._thresholds)
        self._first_step = state.global_step + 1
        self._measured: dict[int, OperandStatisticsHooks] = {}  # by step; only the first one and the last

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        step = state.global_step + 1
        is_logged = _is_logged(step, args, state, kwargs["train_dataloader"])
        if is_logged or (step == self._first_step and args.logging_strategy != "no"):
            hooks = OperandStatisticsHooks(kwargs["model"])
            self._measured[step] = hooks
            entered = self._entered
            for each in (hooks, self._changes):
                entered.enter_context(each)
            # No event follows a step that fails: the hooks would go on measuring, and nothing would be compiled. The
            # next event removes the hook that ends the measurement, since torch is looping over the hooks when it runs.
            end = kwargs["model"].register_forward_hook(_EndOfForward(entered), always_call=True)
            self._ends.callback(end.remove)

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._end()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._end()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if "loss" not in kwargs["logs"]:  # of an evaluation, or at the end
            return
        if state.global_step not in self._measured:
            self._warn_of_log(state.global_step)
            return
        measured, self._measured = self._measured, {}
        if not state.is_world_process_zero:
            return
        trained = _trained_layers(kwargs["model"], kwargs["optimizer"])
        changed = self._changes.result()
        for step, hooks in measured.items():
            statistics = hooks.result()
            is_now = step == state.global_step
            for text in self._warnings.look(statistics, changed if is_now else {}, trained):
                logger.warning("Step %d: %s", step, text)
        figures, operands = summary(statistics, changed, self._warnings.first_clips)
        if self._per_layer:
            figures |= per_layer(statistics, changed)
        kwargs["logs"].update(figures)
        entry: dict[str, Any] = state.log_history[-1]  # a copy of the logs
        entry.update(figures | operands)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        del self._changes, self._measured

    def _end(self) -> None:
        self._entered.close()
        self._ends.close()

    def _warn_of_log(self, step: int) -> None:
        if not self._warned_of_log:
            self._warned_of_log = True
            logger.warning(
                "The log at step %d has no values of OctavCallback, since nothing showed before the step that it would "
                "be logged. Use logging_strategy='steps'.",
                step,
            )


class _EndOfForward:
    """The forward hook that ends a measurement; in a pickled copy of the model it does nothing."""

    def __init__(self, entered: ExitStack | None):
        self._entered = entered

    def __call__(self, *_: Any) -> None:
        if self._entered is not None:
            self._entered.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return _EndOfForward, (None,)


def _is_logged(step: int, args: TrainingArguments, state: TrainerState, dataloader: Any) -> bool:
    """Whether Trainer will log after ``step``, counted from 1, by its strategy: the first step is measured anyway."""
    if args.logging_strategy == "steps":
        return step % state.logging_steps == 0
    if args.logging_strategy == "epoch":
        try:
            steps_per_epoch = -(-len(dataloader) // args.gradient_accumulation_steps)
        except TypeError:  # an iterable dataset
            return step == state.max_steps
        return step == state.max_steps or step % max(steps_per_epoch, 1) == 0
    return False


def _trained_layers(model: nn.Module, optimizer: Any) -> Set[str]:
    """The layers whose quantized weight has a gradient and a learning rate above 0.

    Where weights are sharded, the optimizer's parameters may be others; then the highest learning rate counts.
    """
    rates = {id(weight): group["lr"] for group in optimizer.param_groups for weight in group["params"]}
    highest = max(group["lr"] for group in optimizer.param_groups)
    weights = {name: own_parameters(layer).get("weight") for name, layer in layers_to_freeze(uncompiled(model)).items()}
    return {
        name
        for name, weight in weights.items()
        if weight is not None and weight.requires_grad and rates.get(id(weight), highest) > 0
    }


call_before_others(OctavCallback)
