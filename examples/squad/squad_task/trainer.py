"""A `Trainer` that scores answers instead of logits, and measurements of step time and memory."""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

import octav_hf
from octav_hf import TrainingRun

WARM_UP_STEPS = 2


class QuestionAnsweringTrainer(Trainer):
    """`Trainer` whose evaluation adds the metrics of `score_logits`.

    `score_logits(start_logits, end_logits, prefix)` takes two (F, T) arrays in the order of the evaluation features
    and returns metrics without prefix. Every evaluation uses it, also those during training, so that
    `--metric_for_best_model f1` works. The evaluation features carry no labels, hence there is no evaluation loss.

    Attributes:
        run: facts about the run for the model card of a quantized model, set at the end; a float model gets Trainer's
            own card.
    """

    run: TrainingRun = TrainingRun()

    def __init__(
        self, *args: Any, score_logits: Callable[[np.ndarray, np.ndarray, str], dict[str, float]], **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.score_logits = score_logits

    def evaluation_loop(
        self,
        dataloader: torch.utils.data.DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Run the model over `dataloader` and add the scores of its answers to the metrics, keys `{prefix}_{name}`."""
        # without compute_metrics, Trainer would request only the loss
        output = super().evaluation_loop(dataloader, description, False, ignore_keys, metric_key_prefix)
        # seq2seq models return further outputs after the two logits
        logits: Any = output.predictions
        start_logits, end_logits = logits[:2]
        scores = self.score_logits(start_logits, end_logits, metric_key_prefix)
        named = {f"{metric_key_prefix}_{name}": value for name, value in scores.items()}
        return output._replace(metrics={**(output.metrics or {}), **named})

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the card to the output folder: this package's for a quantized model, otherwise Trainer's."""
        model = self.accelerator.unwrap_model(self.model)
        if getattr(model, "octav_config", None) is None:
            super().create_model_card(*args, **kwargs)
        elif self.is_world_process_zero():
            folder = Path(str(self.args.output_dir))
            self.run.save(folder)
            octav_hf.model_card(model, self.run, name=self.args.hub_model_id or folder.name).save(folder / "README.md")

    def _get_eval_sampler(self, eval_dataset: torch.utils.data.Dataset) -> torch.utils.data.Sampler | None:
        # grouping by length would change the order of the logits
        if self.args.world_size > 1:
            return None
        return torch.utils.data.SequentialSampler(eval_dataset)  # type: ignore[arg-type]


class StepTimer(TrainerCallback):
    """Wall-clock seconds of each optimizer step without data loading; the first two steps are left out."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._begin: float | None = None

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._begin = _now()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._begin is not None:
            self.seconds.append(_now() - self._begin)

    def metrics(self) -> dict[str, float]:
        """`{"train_step_seconds_median": seconds}`, or nothing before the third step."""
        timed = self.seconds[WARM_UP_STEPS:]
        return {"train_step_seconds_median": statistics.median(timed)} if timed else {}


def _now() -> float:
    # GPU kernels run asynchronously, so wait for them
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_memory_bytes() -> int:
    """Peak memory of this process: of the GPU if there is one, otherwise resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
