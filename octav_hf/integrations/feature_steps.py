"""Report Trainer's step to the distillation of a model, which may learn features only in the first steps."""

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .._utils.transformers_compat import add_trainer_callback
from ..training.distillation import Distillation, distillations


class FeatureSteps(TrainerCallback):
    """Reports each step to the distillations of the model; a resumed run continues with its step number.

    Every Trainer gets this callback.
    """

    def __init__(self) -> None:
        self._distillations: list[Distillation] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._distillations = list(distillations(kwargs["model"]))

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for distillation in self._distillations:
            distillation.at_step(state.global_step, state.max_steps)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for distillation in self._distillations:
            distillation.outside_training()
        self._distillations = []


add_trainer_callback(FeatureSteps)
