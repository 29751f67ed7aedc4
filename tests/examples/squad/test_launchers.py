"""The script launched in several processes by torchrun and accelerate gives the result of one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from run_squad import main
from safetensors.torch import load_file
from transformers import AutoTokenizer, BertConfig, BertForQuestionAnswering

from octav_hf import last_whole_checkpoint

SQUAD = Path(__file__).resolve().parents[3] / "examples" / "squad"
GLOBAL_BATCH = 8
TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc_per_node"]
# With --cpu it would start one process, unless there is MPI.
ACCELERATE = ["accelerate.commands.launch", "--multi_gpu", "--num_machines", "1", "--mixed_precision", "no"]
ACCELERATE += ["--dynamo_backend", "no", "--main_process_port", "0", "--num_processes"]


@pytest.fixture(scope="module")
def model(minilm_path: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a random BERT without dropout, which would differ between processes."""
    torch.manual_seed(0)
    folder = str(tmp_path_factory.mktemp("tiny"))
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    BertForQuestionAnswering(BertConfig(max_position_embeddings=128, **sizes, **no_dropout)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(minilm_path, model_max_length=128).save_pretrained(folder)
    return folder


def arguments(model: str, folder: Path, processes: int) -> list[str]:
    """Windows have the same padding in every batch, because padding affects the clips."""
    data = ["--train_file", str(SQUAD / "data/train.json"), "--validation_file", str(SQUAD / "data/dev.json")]
    data += ["--max_train_samples", "24", "--max_eval_samples", "13", "--max_seq_length", "128", "--doc_stride", "32"]
    octav = ["--quantize", "--activation_bits", "8", "--sync_activation_clips", "true", "--pack"]
    octav += ["--calibration_batches", "2"]
    training = ["--do_train", "--do_eval", "--use_cpu", "--max_steps", "3", "--save_steps", "3", "--optim", "sgd"]
    training += ["--learning_rate", "0.1", "--max_grad_norm", "0", "--pad_to_max_length", "true"]
    batches = ["--per_device_train_batch_size", str(GLOBAL_BATCH // processes)]
    return ["--model_name_or_path", model, "--output_dir", str(folder), *data, *octav, *training, *batches]


@pytest.fixture(scope="module")
def alone(model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of one process."""
    folder = tmp_path_factory.mktemp("alone") / "out"
    main(arguments(model, folder, processes=1))
    return folder


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def frozen_clips(folder: Path) -> dict[str, torch.Tensor]:
    """The frozen clips of activations in a checkpoint."""
    tensors = load_file(folder / "model.safetensors")
    return {name: tensor for name, tensor in tensors.items() if name.endswith("clips") and "weight_" not in name}


def flat_weights(folder: Path) -> torch.Tensor:
    """All weights of a checkpoint, without clips, in one vector."""
    tensors = sorted(load_file(folder / "model.safetensors").items())
    return torch.cat([weight.flatten() for name, weight in tensors if "_quantizer." not in name])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "processes"),
    [(TORCHRUN, 2), (TORCHRUN, 4), (ACCELERATE, 2)],
    ids=["torchrun 2", "torchrun 4", "accelerate 2"],
)
def test_several_processes_write_what_one_does(
    model: str, alone: Path, tmp_path: Path, launcher: list[str], processes: int
) -> None:
    folder = tmp_path / "out"
    script = [str(SQUAD / "run_squad.py"), *arguments(model, folder, processes)]
    command = [sys.executable, "-m", *launcher, str(processes), *script]
    # Compiled code would be loaded anew in each process, for tensors that are too small to profit.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OCTAV_HF_COMPILE": "0", "PYTHONPATH": str(SQUAD.parents[1])}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr
    assert run.stderr.count("INFO __main__: Quantized:") == 1, "of the processes one tells what happens"
    assert read(folder / "octav_run.json")["recipe"]["processes"] == processes

    assert {path.name for path in folder.iterdir()} == {path.name for path in alone.iterdir()}
    assert last_whole_checkpoint(folder) == str(folder / "checkpoint-3")
    begin = flat_weights(Path(model))
    for where in ("checkpoint-3", ""):
        got, expected = (flat_weights(out / where) for out in (folder, alone))
        # 1e-6; where a sum in another order falls to the other side of a rounding, it may be more.
        assert (got - expected).norm() < 2e-3 * (expected - begin).norm()
    clips, of_one = (frozen_clips(out) for out in (folder, alone))
    assert clips.keys() == of_one.keys() != set()
    for name, frozen in of_one.items():
        torch.testing.assert_close(clips[name], frozen, rtol=2e-3, atol=0)

    scores, of_one = (read(out / "eval_nbest_predictions.json") for out in (folder, alone))
    assert scores.keys() == of_one.keys()
    for question, candidates in of_one.items():
        assert scores[question][0]["score"] == pytest.approx(candidates[0]["score"], abs=1e-3)
    assert read(folder / "packed_predictions.json") == read(folder / "eval_predictions.json")
    results = read(folder / "all_results.json")
    assert results["packed_f1"] == results["eval_f1"]
