"""Two thousand steps on the example's questions: memory does not grow, and the loss stays finite."""

from __future__ import annotations

import gc
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from squad_files import DATA
from squad_task.dataset import read_squad_file
from squad_task.features import Windows, training_features
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from octav_hf import OctavConfig, apply_octav

STEPS = 2000
MIB = 1 << 20


@dataclass(frozen=True)
class Memory:
    """Memory of a process: resident bytes, and the number of reachable tensors."""

    resident: int
    tensors: int
    tensor_bytes: int


def memory() -> Memory:
    gc.collect()
    storages, tensors = {}, 0
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor):  # isinstance would ask proxies, which answer by importing modules
            tensors += 1
            storages[thing.untyped_storage()._cdata] = thing.untyped_storage().nbytes()
    return Memory(psutil.Process().memory_info().rss, tensors, sum(storages.values()))


class MemoryAtSteps(TrainerCallback):
    def __init__(self, *steps: int) -> None:
        self.found = dict.fromkeys(steps)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in self.found:
            self.found[state.global_step] = memory()


@pytest.mark.slow
def test_nothing_grows(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """Batches differ in length, so that consecutive passes have different shapes; every hundredth step evaluates."""
    examples = read_squad_file(DATA / "train.json").select(range(400))
    windows = Windows(max_seq_length=48, doc_stride=16, max_query_length=16, pad_to_max_length=False)
    features = training_features(examples, tokenizer, windows)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
    )
    model = apply_octav(BertForQuestionAnswering(config), OctavConfig(embedding_bits=8))
    at_steps = MemoryAtSteps(499, STEPS - 1)  # not where it evaluates, for which clips of weights are dropped
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=STEPS,
            per_device_train_batch_size=4,
            learning_rate=1e-3,
            logging_steps=1,
            logging_nan_inf_filter=False,
            eval_strategy="steps",
            eval_steps=100,
            per_device_eval_batch_size=4,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            seed=0,
        ),
        train_dataset=features,
        eval_dataset=features.select(range(4)),
        data_collator=DataCollatorWithPadding(tokenizer),
        callbacks=[at_steps],
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == STEPS
    assert all(map(math.isfinite, losses))
    assert sum(losses[-100:]) < sum(losses[:100]), "it learns"
    before, after = at_steps.found[499], at_steps.found[STEPS - 1]
    print(before, after)
    assert after.tensors == before.tensors
    # The batch in hand may be longer.
    assert abs(after.tensor_bytes - before.tensor_bytes) <= 5 * 4 * 48 * 8
    assert after.resident - before.resident < 16 * MIB
