"""Trainer is killed while training or saving; resumed from the last complete checkpoint, it ends with equal weights."""

import json
import logging
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForQuestionAnswering
from transformers.trainer_utils import get_last_checkpoint

from octav_hf import last_whole_checkpoint
from octav_hf.training.checkpoints import check_checkpoint
from tests.bomb import Bomb

from .interrupted_training import SAVE_STEPS, STEPS, make_trainer

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]

# In the order in which they are written.
FILES = ["config.json", "model.safetensors", "training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth"]
FILES += ["trainer_state.json"]

# Name of a run -> when it dies each time, and which checkpoint it then has to go on from.
Kills = list[tuple[list[Any], str | None]]
RUNS: dict[str, Kills] = {
    "uninterrupted": [],
    **{
        f"{when}_{file}": [(["checkpoint-4", file, when], "checkpoint-2")]
        for file in FILES
        for when in ("before", "half")
    },
    "first_step": [(["step", 1], None)],
    "step_before_the_first_save": [(["step", 2], None)],
    "step_after_a_save": [(["step", 3], "checkpoint-2")],
    "last_step": [(["step", 6], "checkpoint-4")],
    "first_save": [(["checkpoint-2", "optimizer.pt", "half"], None)],
    "last_save": [(["checkpoint-6", "model.safetensors", "half"], "checkpoint-4")],
    "final_model": [(["final_model", "model.safetensors", "half"], "checkpoint-6")],
    "same_save_twice": [
        (["checkpoint-4", "trainer_state.json", "half"], "checkpoint-2"),
        (["checkpoint-4", "optimizer.pt", "half"], "checkpoint-2"),
    ],
    "four_times": [
        (["checkpoint-2", "trainer_state.json", "before"], None),
        (["checkpoint-2", "model.safetensors", "half"], None),
        (["step", 4], "checkpoint-2"),
        (["checkpoint-6", "rng_state.pth", "half"], "checkpoint-4"),
    ],
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all runs, each in a folder of its name, and of ``outcomes.json``."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "kills.json").write_text(json.dumps({name: [kill for kill, _ in kills] for name, kills in RUNS.items()}))
    command = [sys.executable, "-m", "tests.training.interrupted_training", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def copy(runs: Path, tmp_path: Path) -> Path:
    """A copy of the uninterrupted run, to be damaged."""
    return Path(shutil.copytree(runs / "uninterrupted", tmp_path / "copy"))


def same_weights(first: Path, second: Path) -> bool:
    a, b = load_file(first / "model.safetensors"), load_file(second / "model.safetensors")
    assert a.keys() == b.keys()
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("name", RUNS)
def test_a_killed_run_ends_in_the_weights_of_an_uninterrupted_one(runs: Path, name: str) -> None:
    outcome = json.loads((runs / "outcomes.json").read_text())[name]
    assert outcome["codes"] == [-9] * len(RUNS[name]) + [0]
    assert outcome["resumed_from"] == [None, *(checkpoint for _, checkpoint in RUNS[name])]
    for folder in (".", *(f"checkpoint-{step}" for step in range(SAVE_STEPS, STEPS + 1, SAVE_STEPS))):
        assert same_weights(runs / name / folder, runs / "uninterrupted" / folder), folder
    assert last_whole_checkpoint(runs / name) == str(runs / name / "checkpoint-6")


@pytest.mark.parametrize("missing", [None, "optimizer.pt", "rng_state.pth"])
def test_trainer_goes_on_differently_from_what_is_left(runs: Path, copy: Path, missing: str | None) -> None:
    """Why the check exists: Trainer silently accepts a checkpoint without these files."""
    shutil.rmtree(copy / "checkpoint-6")
    if missing:
        (copy / "checkpoint-4" / missing).unlink()
    trainer = make_trainer(copy)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(copy)))
    assert same_weights(copy / "checkpoint-6", runs / "uninterrupted" / "checkpoint-6") == (missing is None)


def passed_over(output_dir: Path, log: pytest.LogCaptureFixture) -> str:
    """The only warning, which is about checkpoint-6; checkpoint-4 must be found instead."""
    with log.at_level(logging.WARNING, "octav_hf"):
        assert last_whole_checkpoint(output_dir) == str(output_dir / "checkpoint-4")
    (message,) = [record.getMessage() for record in log.records if record.name.startswith("octav_hf")]
    assert str(output_dir / "checkpoint-6") in message
    return message


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("seed", range(10))
def test_a_file_that_is_cut_off(copy: Path, file: str, seed: int, caplog: pytest.LogCaptureFixture) -> None:
    path = copy / "checkpoint-6" / file
    content = path.read_bytes()
    # JSON is whole without its last newline; the first two seeds cut off everything and one byte.
    length = len(content.rstrip()) if path.suffix == ".json" else len(content)
    lengths = [0, length - 1, *(random.Random(seed).randrange(length) for seed in range(2, 10))]
    path.write_bytes(content[: lengths[seed]])
    assert f"{file} is truncated" in passed_over(copy, caplog)


@pytest.mark.parametrize("file", [file for file in FILES if file != "config.json"])
def test_a_file_that_is_missing(copy: Path, file: str, caplog: pytest.LogCaptureFixture) -> None:
    (copy / "checkpoint-6" / file).unlink()
    problem = "there are no weights" if file == "model.safetensors" else f"{file} is missing"
    assert problem in passed_over(copy, caplog)


def test_a_missing_config_changes_nothing_for_training(runs: Path, copy: Path) -> None:
    (copy / "checkpoint-4" / "config.json").unlink()
    shutil.rmtree(copy / "checkpoint-6")
    assert last_whole_checkpoint(copy) == str(copy / "checkpoint-4")
    make_trainer(copy).train(resume_from_checkpoint=str(copy / "checkpoint-4"))
    assert same_weights(copy / "checkpoint-6", runs / "uninterrupted")


def test_a_file_of_zeros_and_one_of_another_kind(copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A file as after a power cut: the right length, but zeros."""
    path = copy / "checkpoint-6" / "optimizer.pt"
    content = path.read_bytes()
    half = len(content) // 2
    for damaged in (bytes(len(content)), bytes(half) + content[half:], b"no archive"):
        caplog.clear()
        path.write_bytes(damaged)
        assert "optimizer.pt is truncated or not a torch.save file" in passed_over(copy, caplog)


@pytest.mark.parametrize(("field", "value"), [("compression method", 99), ("version", 99), ("encrypted", 1)])
def test_an_archive_whose_directory_is_damaged(
    copy: Path, field: str, value: int, caplog: pytest.LogCaptureFixture
) -> None:
    """zipfile raises other errors for archives that seem to be in a form that it cannot read."""
    offset = {"version": 6, "encrypted": 8, "compression method": 10}[field]  # in an entry of the zip directory
    for name in ("training_args.bin", "optimizer.pt"):
        caplog.clear()
        path = copy / "checkpoint-6" / name
        content = bytearray(path.read_bytes())
        content[content.rindex(b"PK\x01\x02") + offset] = value
        path.write_bytes(content)
        assert f"{name} is truncated or not a torch.save file" in passed_over(copy, caplog)
        shutil.copy(copy / "checkpoint-4" / name, path)


def test_states_that_are_of_another_step(copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = copy / "checkpoint-6" / "trainer_state.json"
    for content, step in (
        ('{"global_step": 4}', "4"),
        ('{"global_step": null}', "None"),
        ("{}", "None"),
        ("6", "None"),
    ):
        caplog.clear()
        path.write_text(content)
        assert f"global_step={step}" in passed_over(copy, caplog)


def test_a_checkpoint_that_says_that_it_is_unfinished(copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    (copy / "checkpoint-6" / "checkpoint-is-incomplete.txt").touch()  # TrainingArguments.enable_jit_checkpoint
    assert "checkpoint-is-incomplete.txt" in passed_over(copy, caplog)


def test_a_loss_scaler(copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Training in float16 on a GPU saves one."""
    path = copy / "checkpoint-6" / "scaler.pt"
    torch.save({"scale": 65536.0}, path)
    assert last_whole_checkpoint(copy) == str(copy / "checkpoint-6")
    path.write_bytes(path.read_bytes()[:-1])
    assert "scaler.pt is truncated" in passed_over(copy, caplog)


def test_the_newest_is_that_of_the_most_steps(copy: Path) -> None:
    for name, step in (("checkpoint-10", 10), ("checkpoint-x", 12), ("my-checkpoint-14", 14)):
        shutil.copytree(copy / "checkpoint-6", copy / name)
        (copy / name / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    (copy / "checkpoint-11").touch()
    assert last_whole_checkpoint(str(copy)) == str(copy / "checkpoint-10")


def test_folders_without_checkpoints(tmp_path: Path) -> None:
    assert last_whole_checkpoint(tmp_path) is None
    assert last_whole_checkpoint(tmp_path / "absent") is None
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        last_whole_checkpoint(tmp_path / "file")
    with pytest.raises(ValueError, match="there is no such folder"):
        check_checkpoint(tmp_path / "absent")


@pytest.fixture
def sharded(copy: Path) -> Path:
    """The run with its last checkpoint in several files."""
    folder = copy / "checkpoint-6"
    model = AutoModelForQuestionAnswering.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="5KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    return copy


def test_shards(sharded: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = sharded / "checkpoint-6"
    assert last_whole_checkpoint(sharded) == str(folder)
    index = folder / "model.safetensors.index.json"
    for path in [*sorted(folder.glob("model-*.safetensors")), index]:
        content = path.read_bytes()
        for length in [0, len(content.rstrip()) - 1, *random.Random(0).sample(range(len(content) - 1), 3)]:
            caplog.clear()
            path.write_bytes(content[:length])
            assert f"{path.name} is truncated" in passed_over(sharded, caplog)
        caplog.clear()
        path.unlink()
        problem = "there are no weights" if path == index else f"{path.name} is missing"
        assert problem in passed_over(sharded, caplog)
        path.write_bytes(content)
    assert last_whole_checkpoint(sharded) == str(folder)


def test_an_index_of_other_shards(sharded: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = sharded / "checkpoint-6"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shard = folder / index["weight_map"]["qa_outputs.bias"]
    tensors = load_file(shard)
    del tensors["qa_outputs.bias"]
    save_file(tensors, shard, metadata={"format": "pt"})
    assert f"{shard.name} has no tensor qa_outputs.bias" in passed_over(sharded, caplog)
    for text in ("{}", '{"weight_map": {"qa_outputs.bias": 1}}'):
        caplog.clear()
        (folder / "model.safetensors.index.json").write_text(text)
        assert "has no weight_map" in passed_over(sharded, caplog)
    caplog.clear()
    (folder / "model.safetensors.index.json").write_text("[" * 100_000)
    assert "is truncated or not JSON" in passed_over(sharded, caplog)


def test_two_processes(runs: Path, tmp_path: Path) -> None:
    """Each process saves its random state independently, so that of one process may be missing."""
    assert json.loads((runs / "outcomes.json").read_text())["distributed"] == {"codes": [0, 0]}
    copy = Path(shutil.copytree(runs / "distributed", tmp_path / "copy"))
    assert last_whole_checkpoint(copy) == str(copy / "checkpoint-2")
    for rank in (0, 1):
        path = copy / "checkpoint-2" / f"rng_state_{rank}.pth"
        content = path.read_bytes()
        path.write_bytes(content[:-1])
        assert last_whole_checkpoint(copy) == str(copy / "checkpoint-1")
        path.unlink()
        with pytest.raises(
            ValueError, match=rf"checkpoint-2 is not a complete checkpoint: rng_state_{rank}.pth is missing"
        ):
            check_checkpoint(copy / "checkpoint-2")
        assert last_whole_checkpoint(copy) == str(copy / "checkpoint-1")
        path.write_bytes(content)


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_a_gap_in_four_processes(runs: Path, tmp_path: Path, missing: int) -> None:
    folder = shutil.copytree(runs / "distributed" / "checkpoint-2", tmp_path / "checkpoint-2")
    for rank in (2, 3):
        shutil.copy(folder / "rng_state_0.pth", folder / f"rng_state_{rank}.pth")
    check_checkpoint(folder)
    (folder / f"rng_state_{missing}.pth").unlink()
    with pytest.raises(ValueError, match=f"rng_state_{missing}.pth is missing"):
        check_checkpoint(folder)


@pytest.mark.parametrize("name", ["rng_state.pth", "rng_state_1.pth", "rng_state_3.pth"])
def test_random_states_of_another_number_of_processes(runs: Path, tmp_path: Path, name: str) -> None:
    """A save into the folder of an earlier run of more or fewer processes dies at the file."""
    folder = shutil.copytree(runs / "distributed" / "checkpoint-2", tmp_path / "checkpoint-2")
    for other in ("rng_state.pth", "rng_state_2.pth", "rng_state_3.pth"):
        shutil.copy(folder / "rng_state_0.pth", folder / other)
    check_checkpoint(folder)
    (folder / name).write_bytes((folder / name).read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"{name} is truncated"):
        check_checkpoint(folder)


@pytest.mark.parametrize("left", ["optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state.pth", "rng_state_0.pth"])
def test_a_part_of_the_states_is_no_save_of_the_model_only(
    copy: Path, left: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = copy / "checkpoint-6"
    content = (folder / "optimizer.pt").read_bytes()
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (folder / name).unlink()
    (folder / left).write_bytes(content)
    assert "is missing" in passed_over(copy, caplog)


@pytest.mark.versions
def test_a_run_that_saves_the_model_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_trainer(tmp_path, max_steps=1, save_steps=1, save_only_model=True).train()
    assert not (tmp_path / "checkpoint-1" / "optimizer.pt").exists()
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-1")
    assert "was saved with save_only_model" in caplog.text
    (tmp_path / "checkpoint-1" / "trainer_state.json").unlink()
    assert last_whole_checkpoint(tmp_path) is None


def test_adapters(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    trainer = make_trainer(tmp_path, max_steps=1, save_steps=1)
    model = get_peft_model(trainer.model, LoraConfig(target_modules=["query"]))
    model.add_adapter("other", LoraConfig(target_modules=["value"]))
    type(trainer)(model=model, args=trainer.args, train_dataset=trainer.train_dataset).train()
    folder = tmp_path / "checkpoint-1"
    for adapter in (folder, folder / "other"):
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            assert last_whole_checkpoint(tmp_path) == str(folder)
            content = (adapter / name).read_bytes()
            (adapter / name).write_bytes(content[:-2])
            with pytest.raises(ValueError, match=f"{name} is truncated"):
                check_checkpoint(folder)
            (adapter / name).write_bytes(content)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(ValueError, match="adapter_config.json is missing"):
        check_checkpoint(folder)


def test_nothing_is_unpickled(copy: Path, tmp_path: Path) -> None:
    folder, trace = copy / "checkpoint-6", tmp_path / "trace"
    for name in ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.save(Bomb(trace), folder / name)
    assert last_whole_checkpoint(copy) == str(folder)
    assert not trace.exists()
    torch.load(folder / "training_args.bin", weights_only=False)  # and the bomb would have left it
    assert trace.exists()
