"""The console command: outputs are complete and equal models, and errors are one line."""

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
from octav_hf.hub import output_dir
from octav_hf.hub.checkpoint_folder import CheckpointFolder, summary
from octav_hf.hub.output_dir import atomic_output_dir
from tests.architectures.models import ARCHITECTURES
from tests.question_answering import logits

MakeBert = Callable[..., BertForQuestionAnswering]


@pytest.fixture
def trained(small_bert: MakeBert, padded_batch: dict, tmp_path: Path) -> Path:
    """A folder as after training, with a tokenizer file, facts about the run, and files that must not be copied."""
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
    layers = json.loads(capsys.readouterr().out)["layers"]
    stored = {layer["name"]: layer["stored"] for layer in layers}
    assert stored["cls.predictions.decoder"] == "shared"
    assert stored["cls.predictions.transform.dense"] == "packed"
    assert {(layer["bytes"], layer["float32_bytes"]) for layer in layers if layer["stored"] == "shared"} == {(0, 0)}
    pack_octav(apply_octav(small_resnet(), OctavConfig(first_last_bits=8))).save_pretrained(tmp_path / "resnet")
    assert main(["inspect", str(tmp_path / "resnet"), "--json"]) == 0
    assert {layer["bits"] for layer in json.loads(capsys.readouterr().out)["layers"]} == {4, 8}


@pytest.mark.parametrize("packed", [False, True])
def test_inspect_a_model_whose_tensors_have_other_names_in_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture, packed: bool
) -> None:
    model = apply_octav(ARCHITECTURES["ViT"].make(), OctavConfig())
    calibrate_octav(model, weights=True)
    (pack_octav(model) if packed else model).save_pretrained(tmp_path / "vit")
    names = load_file(tmp_path / "vit" / "model.safetensors")
    assert "vit.encoder.layer.0.attention.attention.query.weight" in names  # as in the file; the module is another
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "vit"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    layers = {layer["name"]: layer for layer in facts["layers"]}
    query = layers["vit.layers.0.attention.q_proj"]
    assert query["stored"] == ("packed" if packed else "float32")
    assert query["bytes"] == (32 * 32 // 2 + 4 * 32 if packed else 4 * 32 * 32)
    assert {layer["stored"] for layer in layers.values()} == {query["stored"]}
    assert facts["frozen_weight_clips"] == len(layers) == 14


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
        "truncated": lambda: file.write_bytes(content[:-1]),
        "other shapes": lambda: save_file(tensors | {"qa_outputs.bias": torch.zeros(3)}, file),
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

    assert "already exists" in error_of(capsys, "pack", trained, trained)
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
    for source in (tmp_path / "nowhere", "nowhere"):
        assert f"there is no folder {source}, and no such repository" in error_of(capsys, "inspect", source)


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
    assert main(["unpack", str(tmp_path / "packed"), str(tmp_path / "again")]) == 0
    assert not list((tmp_path / "again").glob(".octav*"))


def listing(folder: Path) -> dict[str, tuple[int, bytes]]:
    """The files below a folder: name -> inode and content."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): (path.stat().st_ino, path.read_bytes()) for path in files}


def write_modules(folder: Path, *paths: object) -> None:
    modules = [{"idx": index, "name": str(index), "path": path} for index, path in enumerate(paths)]
    (folder / "modules.json").write_text(json.dumps(modules))


def test_subfolders_of_modules_are_copied(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The layout of Sentence Transformers."""
    write_modules(trained, "", "1_Pooling", "2_Dense", "3_Normalize")
    for name in (
        "1_Pooling/config.json",
        "2_Dense/model.safetensors",
        "2_Dense/deep/x.txt",
        "2_Dense/pytorch_model.bin",
    ):
        (trained / name).parent.mkdir(parents=True, exist_ok=True)
        (trained / name).write_text(name)
    (tmp_path / "secret").write_text("private")
    (trained / "2_Dense" / "secret").symlink_to(tmp_path / "secret")
    (trained / "secret.txt").symlink_to("../secret")
    (trained / "broken.txt").symlink_to("nothing")
    (trained / "2_Dense" / "loop").symlink_to(".")
    (trained / "alias.txt").symlink_to("vocab.txt")
    assert main(["pack", str(trained), str(tmp_path / "packed")]) == 0
    link = "a link to outside of the checkpoint, or not a file"
    assert capsys.readouterr().out.splitlines()[0] == (
        f"left out: 2_Dense/loop ({link}), 2_Dense/pytorch_model.bin (a pickle), 2_Dense/secret ({link}), "
        f"broken.txt ({link}), checkpoint-1/ (modules.json does not list it), secret.txt ({link})"
    )
    assert main(["unpack", str(tmp_path / "packed"), str(tmp_path / "unpacked")]) == 0
    assert "left out" not in capsys.readouterr().out
    for output in ("packed", "unpacked"):
        assert {
            name for name in listing(tmp_path / output) if "/" in name or name.endswith((".txt", "modules.json"))
        } == {
            *("1_Pooling/config.json", "2_Dense/model.safetensors", "2_Dense/deep/x.txt"),
            *("alias.txt", "modules.json", "vocab.txt"),
        }
        assert (tmp_path / output / "2_Dense" / "model.safetensors").read_text() == "2_Dense/model.safetensors"


def test_modules_elsewhere_are_refused(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for path in ("..", "../trained", "/etc", "a/b", "a\\b", ".git", "a\x1b[2J", 3, None, ["a"]):
        write_modules(trained, "", path)
        with pytest.raises(
            ValueError, match=r"modules.json lists the folder .*; it must be the name of a subfolder"
        ) as caught:
            CheckpointFolder(str(trained)).copy_companions(tmp_path)
        assert f"{path!r}; it must" in str(caught.value)
    (trained / "modules.json").write_text("[[]]")
    assert "must be a list of JSON objects" in error_of(capsys, "pack", trained, tmp_path / "packed")
    assert not (tmp_path / "packed").exists()


def test_a_transformer_in_a_subfolder_is_found(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    whole = tmp_path / "whole"
    (whole / "1_Pooling").mkdir(parents=True)
    (whole / "1_Pooling" / "config.json").write_text("{}")
    trained.rename(whole / "0_Transformer")
    write_modules(whole, "0_Transformer", "1_Pooling")
    error = error_of(capsys, "pack", whole, tmp_path / "packed")
    assert f"according to modules.json, the model is in 0_Transformer/: pass {whole}/0_Transformer instead" in error


@pytest.mark.parametrize("output", [".", "link/", "~/home"])
def test_outputs_that_are_not_plain_new_folders(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str
) -> None:
    """An empty folder stays the same folder, and new files have default permissions."""
    (tmp_path / "there").mkdir(mode=0o750)
    (tmp_path / "link").symlink_to("there")
    (tmp_path / "plain").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path / "there" if output.startswith(".") else tmp_path)
    target = "home" if output == "~/home" else "there"
    before = (tmp_path / "there").stat()
    assert main(["pack", str(trained), output]) == 0
    assert AutoModelForQuestionAnswering.from_pretrained(tmp_path / target).config.quantization_config.packed
    after = (tmp_path / target).stat()
    if target == "there":
        assert (after.st_ino, after.st_mode) == (before.st_ino, before.st_mode)
    else:
        assert after.st_mode == (tmp_path / "plain").stat().st_mode
    assert (tmp_path / "link").is_symlink()
    assert (
        f"# {'there' if output.startswith('.') else Path(output).name}\n"
        in (tmp_path / target / "README.md").read_text()
    )
    assert not list(tmp_path.rglob(".octav*"))


@pytest.mark.parametrize("output", ["new/deep", "there", "link"])
@pytest.mark.parametrize("step", ["save", "move"])
def test_a_run_that_fails_leaves_the_output_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str, step: str
) -> None:
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    def run() -> None:
        with atomic_output_dir(tmp_path / output) as folder:
            for name in ("a", "config.json", "z"):
                (folder / name).write_text(name)
            if step == "save":
                interrupted()

    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("there")
    before = sorted(tmp_path.rglob("*"))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename" if output == "new/deep" else "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run()
    made = {tmp_path / "new"} if (step, output) == ("move", "new/deep") else set()
    assert set(tmp_path.rglob("*")) == {*before, *made}
    if step == "move":
        run()
        assert set(listing(tmp_path / output)) == {"a", "config.json", "z"}


@pytest.mark.parametrize("output", ["new", "there", "link", "dangling"])
@pytest.mark.parametrize("late", [False, True], ids=["one after the other", "at once"])
def test_of_two_runs_the_first_to_finish_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str, late: bool
) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("there")
    (tmp_path / "dangling").symlink_to("nowhere")
    first, second = atomic_output_dir(tmp_path / output), atomic_output_dir(tmp_path / output)
    folders = [first.__enter__(), second.__enter__()]
    assert folders[0] != folders[1]
    for name, folder in zip(("first", "second"), folders, strict=True):
        (folder / "config.json").write_text(name)
        (folder / name).mkdir()
        (folder / name / "weights").write_text(name)
    first.__exit__(None, None, None)
    if late:  # as if the first had finished after the second had looked
        looks = iter([lambda *_: None])
        check = output_dir._check_empty
        monkeypatch.setattr(output_dir, "_check_empty", lambda *where: next(looks, check)(*where))
    with pytest.raises(FileExistsError, match=f"{output} already exists; choose another output"):
        second.__exit__(None, None, None)
    assert {name: content for name, (_, content) in listing(tmp_path / output).items()} == {
        "config.json": b"first",
        "first/weights": b"first",
    }
    assert not list(tmp_path.rglob(".octav*"))


def test_outputs_in_and_around_the_source(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_modules(trained, "", "1_Pooling", "packed")
    (trained / "1_Pooling").mkdir()
    (tmp_path / "a file").write_text("")
    before = listing(tmp_path)
    for refused in (trained, tmp_path, tmp_path / "trained" / "..", tmp_path / "a file"):
        assert f"{refused} already exists" in error_of(capsys, "pack", trained, refused)
    error_of(capsys, "pack", trained, tmp_path / "a file" / "below")
    assert listing(tmp_path) == before
    assert main(["pack", str(trained), str(trained / "packed")]) == 0
    assert CheckpointFolder(str(trained / "packed")).load()
    shutil.rmtree(trained / "packed")
    with atomic_output_dir(trained / "1_Pooling") as folder:
        CheckpointFolder(str(trained)).copy_companions(folder)
        (folder / "config.json").write_text("{}")
        assert not list(folder.rglob(".octav*"))
    shutil.rmtree(trained / "1_Pooling")
    assert listing(tmp_path) == before


def test_a_snapshot_of_the_hubs_cache_is_links(trained: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--me--x" / "snapshots" / "abc", tmp_path / "models--me--x" / "blobs"
    (trained / "1_Pooling").mkdir()
    (trained / "1_Pooling" / "config.json").write_text("{}")
    write_modules(trained, "", "1_Pooling")
    (snapshot / "1_Pooling").mkdir(parents=True)
    trained.rename(blobs)
    for name in listing(blobs):
        if not name.startswith("checkpoint"):
            (snapshot / name).symlink_to(blobs / name)
    assert main(["pack", str(snapshot), str(tmp_path / "packed")]) == 0
    names = listing(tmp_path / "packed")
    assert {"1_Pooling/config.json", "modules.json", "vocab.txt"} < set(names)
    assert not any(path.is_symlink() for path in (tmp_path / "packed").rglob("*"))


def test_inspect_shows_what_each_operand_has(
    small_bert: MakeBert, padded_batch: dict, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    def lines_of(config: OctavConfig, *, frozen: bool = False) -> list[str]:
        model = apply_octav(small_bert(), config)
        if frozen:
            calibrate_octav(model, [padded_batch], progress_bar=False)
        model.save_pretrained(tmp_path / "model")
        capsys.readouterr()
        granularity = summary(CheckpointFolder(str(tmp_path / "model")))["activation_granularity"]
        assert granularity == {operand: config.granularity(operand) for operand in granularity}
        assert main(["inspect", str(tmp_path / "model")]) == 0
        return capsys.readouterr().out.splitlines()

    heads = [f"bert.encoder.layer.{index}.output.dense" for index in range(2)]
    config = OctavConfig.accurate(
        weight_clip="mse_sweep",
        weight_clip_options={"num_points": 3},
        exclude_modules=["*.key"],
        module_overrides={name: {"weight_bits": 8} for name in heads} | {"qa_outputs": {"activation_granularity": {}}},
    )
    text = lines_of(config)
    assert "weights: 4 bits, clip mse_sweep (num_points=3) per channel" in text
    assert (
        "activations: 4 bits, clip mse per token (input, query, key, probabilities), per channel (value), dynamic"
        in text
    )
    assert "excluded: *.key" in text
    assert f"override: weight_bits=8 for {', '.join(heads)}" in text
    assert "override: activation_granularity={} for qa_outputs" in text
    assert "activations: 4 bits, clip octav per tensor, dynamic" in lines_of(OctavConfig())
    (activations,) = [line for line in lines_of(config, frozen=True) if line.startswith("activations")]
    assert activations.endswith("frozen for 19 activations (where the config says per token, per tensor)")
    floating = lines_of(OctavConfig(activation_bits=None, weight_bits=None, embedding_bits=8))
    assert {"weights: floating point", "activations: floating point", "embeddings: 8 bits"} < set(floating)
    alone = lines_of(OctavConfig(activation_granularity={"input": "token"}, quantize_attention=False))
    assert "activations: 4 bits, clip octav per token, attention matmuls in floating point, dynamic" in alone


def test_an_architecture_has_to_be_a_model(trained: Path, capsys: pytest.CaptureFixture) -> None:
    config = json.loads((trained / "config.json").read_text())
    names = ("pipeline", "models", "utils", "AutoModel", "BertConfig", "PreTrainedModel", "__name__", "os")
    for architecture in (*names, "BertModel.forward", "\x1b[2J", 3, None, ["BertModel"]):
        (trained / "config.json").write_text(json.dumps(config | {"architectures": [architecture]}))
        assert f"Transformers has no model class {architecture!r}" in error_of(capsys, "inspect", trained)


def test_an_index_names_files_beside_it(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    shutil.copy(trained / "model.safetensors", tmp_path / "x.safetensors")
    tensors = load_file(trained / "model.safetensors")
    (trained / "model.safetensors").unlink()
    index = trained / "model.safetensors.index.json"
    paths = ("../x.safetensors", f"{tmp_path}/x.safetensors", "a/x.safetensors", "a\\x.safetensors", "..")
    for name in (*paths, "x.bin", "", 3, None, "\x9b.safetensors"):
        index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(tensors, name)}))
        assert f"weight_map names the file {name!r}; it must be the name of" in error_of(capsys, "inspect", trained)
    for content in ("[]", "{}", '{"weight_map": []}'):
        index.write_text(content)
        assert "must be a JSON object with a weight_map" in error_of(capsys, "inspect", trained)


def test_code_of_a_checkpoint_is_not_run(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (trained / "evil.py").write_text(f"open({str(tmp_path / 'trace')!r}, 'w')\nclass C: pass\n")
    config = json.loads((trained / "config.json").read_text())
    config |= {"auto_map": dict.fromkeys(["AutoConfig", "AutoModel", "AutoModelForQuestionAnswering"], "evil.C")}
    for changed in (config, config | {"model_type": "evil"}):
        (trained / "config.json").write_text(json.dumps(changed))
        main(["inspect", str(trained)])
        assert not (tmp_path / "trace").exists()
    capsys.readouterr()
    (trained / "config.json").write_text(json.dumps(config | {"transformers_weights": "../x.safetensors"}))
    assert "transformers_weights, which names other files" in error_of(capsys, "inspect", trained)


def test_a_terminal_gets_no_commands(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    config = json.loads((trained / "config.json").read_text())
    config["quantization_config"] |= {
        "exclude_modules": ["x\x1b[2J"],
        "module_overrides": {"\x9by": {"weight_bits": 8}},
    }
    (trained / "config.json").write_text(json.dumps(config))
    main(["inspect", str(trained)])
    (trained / "\x1b]0;owned\x07").mkdir()
    main(["pack", str(trained), str(tmp_path / "packed")])
    captured = capsys.readouterr()
    assert all(character.isprintable() or character == "\n" for character in captured.out + captured.err)
    for bad in ({"weight_clip": "\x1b[2J"}, {"\x1b[2J": 1}, {"quant_method": "\x1b[2J"}):
        changed = config | {"quantization_config": config["quantization_config"] | bad}
        (trained / "config.json").write_text(json.dumps(changed))
        error = error_of(capsys, "inspect", trained)
        assert r"\x1b[2J" in error
        assert error.isprintable()
    assert error_of(capsys, "card", "no\x1b[2J") == r"octav-hf: no\x1b[2J is not a folder"


@pytest.mark.parametrize("arguments", [[], ["pack"], ["pack", "a"], ["explain", "a"], ["push", "a"]])
def test_wrong_usage_ends_with_status_2(arguments: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "usage: octav-hf" in capsys.readouterr().err


@pytest.mark.slow
def test_export(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["export", "--format", "onnx", str(trained), str(tmp_path / "onnx"), "--verify"]) == 0
    assert "17 integer matmuls, all sums exact; 0 in float" in capsys.readouterr().out
    names = {path.name for path in (tmp_path / "onnx").iterdir()}
    assert names == {"model.onnx", "config.json", "octav_export.json", "vocab.txt"}
    assert "already exists" in error_of(capsys, "export", "--format", "onnx", trained, tmp_path / "onnx")


def test_export_of_dynamic_clips(small_bert: MakeBert, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    apply_octav(small_bert(), OctavConfig()).save_pretrained(tmp_path / "dynamic")
    capsys.readouterr()
    error = error_of(capsys, "export", "--format", "onnx", tmp_path / "dynamic", tmp_path / "onnx")
    assert "calibrate_octav(model, batches)" in error
    assert not (tmp_path / "onnx").exists()
