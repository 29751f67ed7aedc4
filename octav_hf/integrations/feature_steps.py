"""Tells the distillation of a model the step of Trainer, since features may be learned in the first steps only."""

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .._utils.transformers_compat import add_trainer_callback
from ..training.distillation import Distillation, distillations


class FeatureSteps(TrainerCallback):
    """Sets at each step what ``distill`` learns, by the step's number, which a resumed run knows.

    Every Trainer gets one.
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
