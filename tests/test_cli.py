"""The console command: what it writes is whole and the same model, and what it refuses it says in one line."""

import importlib.metadata
import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard, close_session, constants
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForQuestionAnswering,
    BertForQuestionAnswering,
    ResNetForImageClassification,
)

from octav_hf import OctavConfig, TrainingRun, apply_octav, calibrate_octav, pack_octav
from octav_hf.cli import main
from tests.question_answering import logits

MakeBert = Callable[..., BertForQuestionAnswering]


@pytest.fixture
def trained(small_bert: MakeBert, padded_batch: dict, tmp_path: Path) -> Path:
    """A folder as a training leaves it, with a tokenizer's file, the run's facts, and what nobody should copy."""
    model = calibrate_octav(apply_octav(small_bert(), OctavConfig()), [padded_batch], progress_bar=False)
    model.save_pretrained(tmp_path / "trained")
    (tmp_path / "trained" / "vocab.txt").write_text("a\nb\n")
    (tmp_path / "trained" / "training_args.bin").write_bytes(b"a pickle")
    (tmp_path / "trained" / "checkpoint-1").mkdir()
    (tmp_path / "trained" / "checkpoint-1" / "vocab.txt").write_text("old")
    for name in ("trainer_state.json", "all_results.json", "eval_predictions.json"):
        (tmp_path / "trained" / name).write_text("{}")
    TrainingRun(base_model="me/bert", dataset="squad", metrics={"f1": 81.5}).save(tmp_path / "trained")
    return tmp_path / "trained"


def error_of(capsys: pytest.CaptureFixture, *arguments: object) -> str:
    assert main([str(argument) for argument in arguments]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("octav-hf: ")
    return line


def test_it_is_installed_as_octav_hf() -> None:
    commands = importlib.metadata.entry_points(group="console_scripts", name="octav-hf")
    assert {command.value for command in commands} == {"octav_hf.cli:main"}


def test_pack_and_unpack(trained: Path, padded_batch: dict, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    packed, unpacked = tmp_path / "new" / "packed", tmp_path / "unpacked"
    assert main(["pack", str(trained), str(packed)]) == 0
    assert "packed form" in capsys.readouterr().out
    before, after = (AutoModelForQuestionAnswering.from_pretrained(folder) for folder in (trained, packed))
    assert after.config.quantization_config.packed
    assert torch.equal(logits(after, padded_batch), logits(before, padded_batch))
    names = {path.name for path in packed.iterdir()}
    assert names == {"README.md", "config.json", "model.safetensors", "octav_run.json", "vocab.txt"}
    assert [path.name for path in packed.parent.iterdir()] == ["packed"]
    card = ModelCard.load(packed / "README.md")
    assert card.data.eval_results[0].metric_value == 81.5
    assert "| form | packed |" in card.text

    assert main(["unpack", str(packed), str(unpacked)]) == 0
    model = AutoModelForQuestionAnswering.from_pretrained(unpacked)
    assert torch.equal(model.qa_outputs.weight, after.qa_outputs.weight)
    assert not model.config.quantization_config.packed


def test_pack_with_embeddings_in_shards(trained: Path, tmp_path: Path) -> None:
    arguments = ["--embedding-bits", "8", "--max-shard-size", "10KB"]
    assert main(["pack", str(trained), str(tmp_path / "packed"), *arguments]) == 0
    assert len(list((tmp_path / "packed").glob("*.safetensors"))) > 1
    loaded = AutoModelForQuestionAnswering.from_pretrained(tmp_path / "packed")
    assert loaded.config.quantization_config.embedding_bits == 8


def test_a_card_by_somebody_else_is_kept(trained: Path, tmp_path: Path) -> None:
    (trained / "README.md").write_text("---\ntags:\n- octav\n---\n\nMy own words.\n")
    assert main(["card", str(trained)]) == 0
    assert main(["pack", str(trained), str(tmp_path / "packed")]) == 0
    for folder in (trained, tmp_path / "packed"):
        assert "My own words." in (folder / "README.md").read_text()


def test_card(trained: Path) -> None:
    assert main(["card", str(trained)]) == 0
    card = ModelCard.load(trained / "README.md")
    assert card.data.base_model == "me/bert"
    assert card.data.model_name == "trained"
    assert "| form | training form |" in card.text


def test_inspect(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    main(["pack", str(trained), str(tmp_path / "packed")])
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "packed"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["form"], facts["format_version"], facts["frozen_clips"]) == ("packed", 2, 13 + 8)
    layers = {layer["name"]: layer for layer in facts["layers"]}
    assert len(layers) == 13
    query = layers["bert.encoder.layer.0.attention.self.query"]
    assert query["shape"] == [32, 32]
    assert query["bytes"] == 32 * 32 // 2 + 4 * 32
    assert facts["layer_bytes"] == sum(layer["bytes"] for layer in facts["layers"])
    assert facts["file_bytes"] == (tmp_path / "packed" / "model.safetensors").stat().st_size

    assert main(["inspect", str(tmp_path / "packed")]) == 0
    text = capsys.readouterr().out
    assert "frozen for 21 activations" in text
    assert "every tensor is as it was saved" in text
    assert main(["inspect", str(trained)]) == 0
    text = capsys.readouterr().out
    assert "training form" in text
    assert "as it was saved" not in text


def test_inspect_a_model_with_a_shared_table_and_a_convolutional_one(
    small_bert: MakeBert,
    small_resnet: Callable[..., ResNetForImageClassification],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    from transformers import BertForMaskedLM

    pack_octav(apply_octav(BertForMaskedLM(small_bert().config), OctavConfig())).save_pretrained(tmp_path / "tied")
    assert main(["inspect", str(tmp_path / "tied"), "--json"]) == 0
    stored = {layer["name"]: layer["stored"] for layer in json.loads(capsys.readouterr().out)["layers"]}
    assert stored["cls.predictions.decoder"] == "shared"
    assert stored["cls.predictions.transform.dense"] == "packed"
    pack_octav(apply_octav(small_resnet(), OctavConfig(first_last_bits=8))).save_pretrained(tmp_path / "resnet")
    assert main(["inspect", str(tmp_path / "resnet"), "--json"]) == 0
    assert {layer["bits"] for layer in json.loads(capsys.readouterr().out)["layers"]} == {4, 8}


def test_a_damaged_checkpoint_is_named(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    main(["pack", str(trained), str(tmp_path / "packed")])
    capsys.readouterr()
    file = tmp_path / "packed" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    for command in (["inspect", tmp_path / "packed"], ["push", tmp_path / "packed", "me/x"]):
        assert f"{file}: the values of qa_outputs" in error_of(capsys, *command)


def test_a_damaged_training_form_is_named(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = trained / "model.safetensors"
    content, tensors = file.read_bytes(), load_file(file)
    without_one = {
        name: tensor for name, tensor in tensors.items() if not name.endswith("0.attention.self.query.weight")
    }
    damaged = {
        "cut off": lambda: file.write_bytes(content[:-1]),
        "of another shape": lambda: save_file(tensors | {"qa_outputs.bias": torch.zeros(3)}, file),
        "query.weight missing": lambda: save_file(without_one, file),
        "is missing (1 in all)": file.unlink,
    }
    for message, damage in damaged.items():
        damage()
        for command in (["inspect", trained], ["pack", trained, tmp_path / "packed"], ["push", trained, "me/x"]):
            error = error_of(capsys, *command)
            assert message in error
            assert str(file) in error
    assert not (tmp_path / "packed").exists()


def test_metrics_of_other_outputs_are_dropped(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    main(["pack", str(trained), str(tmp_path / "packed")])
    assert TrainingRun.load(tmp_path / "packed").metrics == {"f1": 81.5}
    main(["unpack", str(tmp_path / "packed"), str(tmp_path / "unpacked")])
    main(["pack", str(trained), str(tmp_path / "smaller"), "--embedding-bits", "8"])
    for folder in ("unpacked", "smaller"):
        assert TrainingRun.load(tmp_path / folder) == TrainingRun(base_model="me/bert", dataset="squad")
        assert "81.5" not in (tmp_path / folder / "README.md").read_text()
    assert capsys.readouterr().out.count("evaluate anew") == 2


def test_what_cannot_be_done_is_said_and_nothing_is_written(
    trained: Path, small_bert: MakeBert, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    output = tmp_path / "output"
    assert "is not packed" in error_of(capsys, "unpack", trained, output)
    assert "embedding_bits must be an integer from 2 to 8" in error_of(
        capsys, "pack", trained, output, "--embedding-bits", "9"
    )
    small_bert().save_pretrained(tmp_path / "float")
    capsys.readouterr()
    assert "is not quantized with octav" in error_of(capsys, "pack", tmp_path / "float", output)
    assert "has no config.json" in error_of(capsys, "inspect", tmp_path)
    assert not output.exists()
    assert not [path for path in tmp_path.iterdir() if "unfinished" in path.name]

    assert "exists already" in error_of(capsys, "pack", trained, trained)
    config = json.loads((trained / "config.json").read_text())
    for architecture in ("NoSuchModel", None):
        (trained / "config.json").write_text(
            json.dumps(config | {"architectures": [architecture] if architecture else None})
        )
        assert "has no model class" in error_of(capsys, "inspect", trained)
    newer = config | {"quantization_config": config["quantization_config"] | {"format_version": 9}}
    (trained / "config.json").write_text(json.dumps(newer))
    assert "format version 9" in error_of(capsys, "inspect", trained)
    assert "is not a folder" in error_of(capsys, "push", tmp_path / "nowhere", "me/x")


def test_a_hub_that_cannot_be_reached(
    trained: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "offline mode is enabled" in error_of(capsys, "push", trained, "me/x")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    close_session()  # the client reads the environment when it is made
    with socket.socket() as not_listening:
        not_listening.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{not_listening.getsockname()[1]}")
        assert "refused" in error_of(capsys, "push", trained, "me/x")


def test_an_interrupted_pack_leaves_no_folder(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(BertForQuestionAnswering, "save_pretrained", interrupted)
    with pytest.raises(KeyboardInterrupt):
        main(["pack", str(trained), str(tmp_path / "packed")])
    assert {path.name for path in tmp_path.iterdir()} == {"trained"}


def test_what_a_killed_pack_left_is_in_nobodys_way(trained: Path, tmp_path: Path) -> None:
    for output in ("packed", "new"):
        if output == "packed":
            shutil.copytree(trained, tmp_path / output / ".octav-hf-unfinished-1")
        else:
            shutil.copytree(trained, tmp_path / ".octav-hf-unfinished-2")
        assert main(["pack", str(trained), str(tmp_path / output)]) == 0
        assert AutoModelForQuestionAnswering.from_pretrained(tmp_path / output)
        assert main(["unpack", str(tmp_path / output), str(tmp_path / f"{output}-again")]) == 0
        assert not list((tmp_path / f"{output}-again").glob(".octav*"))


@pytest.mark.parametrize("arguments", [[], ["pack"], ["pack", "a"], ["explain", "a"], ["push", "a"]])
def test_wrong_usage_ends_with_status_2(arguments: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "usage: octav-hf" in capsys.readouterr().err
