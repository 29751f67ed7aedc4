"""Trains a small quantized BERT in processes that kill themselves, and resumes: run by ``test_interrupted.py``.

    python -m tests.training.interrupted_training FOLDER

FOLDER/kills.json says when the runs die, by name; how they went is written to FOLDER/outcomes.json. This process
imports once and trains nothing itself; each run is a fork of it.
"""

import contextlib
import json
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import BertConfig, BertForQuestionAnswering, PreTrainedConfig, Trainer, TrainingArguments
from transformers.trainer_callback import TrainerState

from octav_hf import OctavConfig, apply_octav, last_whole_checkpoint
from tests.question_answering import Spans

with contextlib.suppress(ImportError):
    import deepspeed  # noqa: F401  # Accelerate would import it in every fork

STEPS, SAVE_STEPS = 6, 2


def make_trainer(output_dir: Path, **arguments: Any) -> Trainer:
    """A Trainer of a small BERT with dropout, always the same."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(vocab_size=100, max_position_embeddings=16, **sizes)
    defaults = {"max_steps": STEPS, "save_steps": SAVE_STEPS, "per_device_train_batch_size": 4, "learning_rate": 1e-2}
    quiet = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "logging_strategy": "no"}
    return Trainer(
        model=apply_octav(BertForQuestionAnswering(config), OctavConfig()),
        args=TrainingArguments(output_dir=str(output_dir), **(defaults | quiet | arguments)),
        train_dataset=Spans(),
    )


def kill_this_process() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_while_writing(folder: str, name: str, when: str) -> None:
    """Make the process die at one of the files: "before" it is opened, or when "half" of it is written."""

    def dying(write: Callable[..., None]) -> Callable[..., None]:
        def write_or_die(content: Any, path: Any, *rest: Any, **options: Any) -> None:
            aimed_at = str(path).endswith(f"{folder}/{name}")
            if aimed_at and when == "before":
                kill_this_process()
            write(content, path, *rest, **options)
            if aimed_at:
                os.truncate(path, os.path.getsize(path) // 2)
                kill_this_process()

        return write_or_die

    torch.save = dying(torch.save)
    transformers.modeling_utils.safe_save_file = dying(transformers.modeling_utils.safe_save_file)
    PreTrainedConfig.to_json_file = dying(PreTrainedConfig.to_json_file)
    TrainerState.save_to_json = dying(TrainerState.save_to_json)


def kill_in_step(trainer: Trainer, step: int) -> None:
    """Die in the middle of the backward pass of a step, counted from 1."""

    def die_in_step(gradient: torch.Tensor) -> None:
        if trainer.state.global_step == step - 1:
            kill_this_process()

    trainer.model.bert.encoder.layer[0].output.dense.weight.register_hook(die_in_step)


def train(output_dir: Path, kill: list[Any] | None, checkpoint: str | None, **arguments: Any) -> None:
    trainer = make_trainer(output_dir, **arguments)
    if kill and kill[0] == "step":
        kill_in_step(trainer, kill[1])
    elif kill:
        kill_while_writing(*kill)
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()


def fork(function: Callable[[], None]) -> int:
    """Start a function in a separate process; returns its id."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        function()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def wait(process: int) -> int:
    """The process's exit code, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def run(output_dir: Path, kills: list[Any]) -> dict[str, Any]:
    """Train to the end, with all kills and resumes."""
    codes, resumed_from = [], []
    for kill in [*kills, None]:
        checkpoint = last_whole_checkpoint(output_dir)
        resumed_from.append(checkpoint and Path(checkpoint).name)
        codes.append(wait(fork(lambda kill=kill, checkpoint=checkpoint: train(output_dir, kill, checkpoint))))
    return {"codes": codes, "resumed_from": resumed_from}


def run_distributed(output_dir: Path, processes: int) -> dict[str, Any]:
    """Train in several processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def train_rank(rank: int) -> None:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        train(output_dir, None, None, max_steps=2, save_steps=1, per_device_train_batch_size=2, ddp_backend="gloo")
        torch.distributed.destroy_process_group()

    return {"codes": [wait(process) for process in [fork(lambda rank=r: train_rank(rank)) for r in range(processes)]]}


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    kills_of = json.loads((folder / "kills.json").read_text())
    outcomes = {name: run(folder / name, kills) for name, kills in kills_of.items()}
    outcomes["distributed"] = run_distributed(folder / "distributed", 2)
    (folder / "outcomes.json").write_text(json.dumps(outcomes))


if __name__ == "__main__":
    main()
