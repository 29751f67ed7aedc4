"""The same seed gives the same weights bit for bit, with the fast kernels too."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import BertForQuestionAnswering, Trainer, TrainingArguments

from octav_hf import OctavConfig, apply_octav
from octav_hf.functional.kernels import compilation, cpu, fused
from tests.question_answering import Spans
from tests.seeded_training import train

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent


def test_another_process_gets_the_same_weights_with_the_fast_kernels() -> None:
    assert fused.fuses(torch.zeros(4 * 64 * 192))
    assert cpu.is_supported(torch.zeros(1, 192 * 256))
    other = subprocess.run(
        [sys.executable, "-m", "tests.seeded_training", "0"],
        cwd=ROOT,
        env=os.environ | {"PYTHONHASHSEED": "12345"},
        check=True,
        capture_output=True,
        text=True,
    )
    digest = train(0)
    assert not compilation.kernels_disabled()
    assert other.stdout.split() == [digest]
    assert train(0) == digest
    assert train(1) != digest


def test_the_same_weights_twice_without_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(compilation.SWITCH, "0")
    assert train(0) == train(0) != train(1)


def trainer_weights(model: nn.Module, folder: Path, **arguments: object) -> dict[str, torch.Tensor]:
    settings = {"max_steps": 6, "per_device_train_batch_size": 8, "learning_rate": 1e-3, "save_strategy": "no"}
    settings |= {"report_to": [], "use_cpu": True, "disable_tqdm": True, "seed": 3, "logging_strategy": "no"}
    Trainer(
        model=model,
        args=TrainingArguments(output_dir=str(folder), **(settings | arguments)),
        train_dataset=Spans(count=24, length=48, shortest=30),
    ).train()
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize(
    "arguments",
    [{}, {"bf16": True}, {"gradient_accumulation_steps": 2, "full_determinism": True}],
    ids=["float32", "bf16", "accumulation, deterministic algorithms"],
)
def test_two_trainer_runs_get_the_same_weights(
    small_bert: Callable[..., BertForQuestionAnswering], tmp_path: Path, arguments: dict
) -> None:
    """In one process, leftovers of the first run (cached clips, compiled functions) do not affect the second."""
    sizes = {"hidden_size": 96, "num_hidden_layers": 1, "intermediate_size": 128}
    probabilities = torch.zeros(8 * 4 * 48 * 48)
    assert fused.fuses(probabilities)
    assert cpu.is_supported(probabilities[None])
    try:
        first, second = (
            trainer_weights(apply_octav(small_bert(**sizes), OctavConfig()), tmp_path / run, **arguments)
            for run in "ab"
        )
    finally:
        torch.use_deterministic_algorithms(False)
    for name, tensor in first.items():
        assert torch.equal(second[name], tensor), name
    start = small_bert(**sizes).state_dict()
    assert not torch.equal(first["qa_outputs.weight"], start["qa_outputs.weight"])
    other_seed = trainer_weights(
        apply_octav(small_bert(**sizes), OctavConfig()), tmp_path / "c", **(arguments | {"seed": 4})
    )
    assert not torch.equal(other_seed["qa_outputs.weight"], first["qa_outputs.weight"])


def test_a_forward_pass_takes_no_random_numbers(
    small_bert: Callable[..., BertForQuestionAnswering], padded_batch: dict
) -> None:
    """Converting does not change the random state of an experiment."""
    model = small_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).train()
    before = hashlib.sha256(torch.get_rng_state().numpy().tobytes()).hexdigest()
    apply_octav(model, OctavConfig(embedding_bits=4))
    model(**padded_batch).start_logits.sum().backward()
    assert hashlib.sha256(torch.get_rng_state().numpy().tobytes()).hexdigest() == before
