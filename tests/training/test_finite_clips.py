"""Trainer and ``save_pretrained`` raise an error for NaN and Inf where operations cannot.

On a GPU, and here in compiled models: the forward pass of a compiled model raises none on the CPU either.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import SequentialSampler
from transformers import BertForQuestionAnswering, Trainer, TrainingArguments

from octav_hf import OctavConfig, apply_octav, check_finite
from octav_hf.training.finite_clips import FiniteClips

Tensor = torch.Tensor
MakeBert = Callable[..., BertForQuestionAnswering]

SAMPLES, BATCH = 24, 4  # six steps


class Regression(nn.Module):
    """A module for Trainer; one batch of its data may contain NaN."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = apply_octav(nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 1)), OctavConfig())

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        y = self.layers(x)[:, 0]
        return {"loss": (y - labels).square().mean(), "logits": y}


def samples(broken: int | None = None) -> list[dict[str, Tensor]]:
    """Samples in training order; the sample with this index contains Inf."""
    generator = torch.Generator().manual_seed(0)
    made = [{"x": torch.randn(8, generator=generator), "labels": torch.tensor(1.0)} for _ in range(SAMPLES)]
    if broken is not None:
        made[broken]["x"][2] = float("inf")
    return made


class InOrder(Trainer):
    def _get_train_sampler(self, *_: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


def trainer(folder: Path, data: list[dict[str, Tensor]], **settings: Any) -> Trainer:
    torch._dynamo.reset()
    arguments = {"save_strategy": "no", "logging_strategy": "no", "report_to": "none", "disable_tqdm": True}
    arguments |= {"num_train_epochs": 1, "per_device_train_batch_size": BATCH, "use_cpu": True}
    arguments |= {"torch_compile": True, "torch_compile_backend": "eager"}
    return InOrder(
        Regression(), TrainingArguments(str(folder), **arguments | settings), train_dataset=data, eval_dataset=samples()
    )


THIRD_STEP = 2 * BATCH + 1
OPERAND = "0 input: this operand held NaN or Inf"


@pytest.mark.versions
def test_the_step_whose_loss_trainer_replaces_is_an_error(tmp_path: Path) -> None:
    run = trainer(tmp_path, samples(THIRD_STEP))
    with pytest.raises(ValueError, match=f"^{OPERAND} in step 3 of the training, so it has no clipping scalar"):
        run.train()
    assert run.state.global_step == 2
    assert all(parameter.isfinite().all() for parameter in run.model.parameters()), "no optimizer step was made of it"


def test_with_gradient_accumulation(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"^{OPERAND} in step 2 of the training"):
        trainer(tmp_path, samples(THIRD_STEP), gradient_accumulation_steps=2).train()


@pytest.mark.slow
@pytest.mark.versions
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"logging_strategy": "steps", "logging_steps": 4}, "in a step from 1 to 4 of the training"),
        ({"logging_strategy": "steps", "logging_steps": 2}, "in a step from 3 to 4 of the training"),
        ({"save_strategy": "steps", "save_steps": 5}, "in a step from 1 to 5 of the training"),
        ({"eval_strategy": "steps", "eval_steps": 3}, "in a step from 1 to 3 of the training"),
        ({"eval_strategy": "epoch"}, "in a step from 1 to 6 of the training"),
        ({}, "in a step from 1 to 6 of the training"),
    ],
    ids=["logging", "logging often", "saving", "evaluation", "epoch", "end"],
)
def test_where_trainer_waits_next(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    run = trainer(tmp_path, samples(THIRD_STEP), logging_nan_inf_filter=False, **settings)
    # In the steps after the third, the weights are NaN too.
    with pytest.raises(ValueError, match=f"^0 (input|weight): this operand held NaN or Inf {message}"):
        run.train()
    assert not list(tmp_path.iterdir()), "nothing of it was saved"


@pytest.mark.versions
def test_in_evaluation(tmp_path: Path) -> None:
    run = trainer(tmp_path, samples(), torch_compile=False, torch_compile_backend=None)
    run.model.compile(backend="eager")  # Trainer compiles for training only
    for part in (run.evaluate, run.predict):
        with pytest.raises(ValueError, match=f"^{OPERAND} in evaluation"):
            part(samples(THIRD_STEP))
        part(samples())


def test_a_finite_run_and_who_checks_it(tmp_path: Path) -> None:
    run = trainer(tmp_path, samples(), logging_strategy="steps", logging_steps=1)
    assert sum(isinstance(callback, FiniteClips) for callback in run.callback_handler.callbacks) == 1
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert len(losses) == SAMPLES // BATCH
    assert losses[-1] < losses[0]


def test_on_the_cpu_without_a_compiler_the_error_is_the_rules(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^0 input: octav_clip: x of shape \(4, 8\).*1 Inf"):
        trainer(tmp_path, samples(THIRD_STEP), torch_compile=False, torch_compile_backend=None).train()


def test_nothing_is_saved_of_a_model_that_met_nan(small_bert: MakeBert, tmp_path: Path) -> None:
    model = apply_octav(small_bert(), OctavConfig())
    quantizer = model.bert.encoder.layer[1].output.dense.input_quantizer
    torch.compile(lambda x: quantizer(x), backend="eager")(torch.tensor([float("nan")]))
    with pytest.raises(ValueError, match=r"^bert.encoder.layer.1.output.dense input: this operand held NaN or Inf, so"):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()
    check_finite(model)
    model.save_pretrained(tmp_path / "model")
