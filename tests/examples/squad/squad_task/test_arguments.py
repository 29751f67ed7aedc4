"""Accepted and refused command-line arguments."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from run_squad import check_output_dir, checkpoint_to_resume, main, parse_arguments
from squad_task.arguments import OctavArguments
from squad_task.data_arguments import DataArguments

from octav_hf import OctavConfig
from octav_hf.config import WRITTEN_FIELDS
from octav_hf.functional import CLIP_RULES

BASE = ["--model_name_or_path", "m", "--train_file", "t.json", "--output_dir", "o", "--do_train"]


def octav(*words: str) -> OctavArguments:
    return parse_arguments([*BASE, *words])[2]


def test_float_is_the_default() -> None:
    assert octav().quantize is False


def test_defaults_are_those_of_the_config() -> None:
    config = octav("--quantize").to_config()
    assert (config.weight_bits, config.activation_bits) == (4, 4)
    assert (config.weight_clip, config.weight_gradient_estimator, config.activation_gradient_estimator) == (
        "octav",
        "mad",
        "pwl",
    )


def test_options_reach_the_config() -> None:
    config = octav(
        *("--quantize", "--weight_bits", "6", "--activation_bits", "none", "--weight_clip", "percentile"),
        *(
            "--weight_clip_options",
            '{"percentile": 99.5}',
            "--weight_gradient_estimator",
            "ste",
            "--activation_gradient_estimator",
            "mad",
        ),
        *("--exclude_modules", "qa_outputs", "bert.pooler", "--quantize_attention", "false"),
        *("--module_overrides", '{"bert.encoder": {"weight_bits": 8}}', "--activation_clip", "max"),
        *("--activation_granularity", '{"input": "token"}'),
    ).to_config()
    assert config.weight_bits == 6
    assert config.activation_bits is None
    assert (config.weight_clip, config.activation_clip) == ("percentile", "max")
    assert config.weight_clip_options == {"percentile": 99.5}
    assert (config.weight_gradient_estimator, config.activation_gradient_estimator) == ("ste", "mad")
    assert list(config.exclude_modules) == ["qa_outputs", "bert.pooler"]
    assert config.module_overrides == {"bert.encoder": {"weight_bits": 8}}
    assert config.activation_granularity == {"input": "token"}
    assert config.quantize_attention is False


@pytest.mark.parametrize("rule", list(CLIP_RULES))
def test_every_registered_clip_is_a_choice(rule: str) -> None:
    assert octav("--quantize", "--weight_clip", rule).to_config().weight_clip == rule


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--weight_bits", "4"], "--weight_bits would be ignored: add --quantize"),
        (["--quantize_attention", "true"], "--quantize_attention would be ignored"),
        (["--quantize", "--weight_bits", "four"], 'or "none"'),
        (["--quantize", "--weight_clip", "median"], "--weight_clip is one of .*octav.*, not .median"),
        (["--quantize", "--weight_clip_options", "{oops"], "--weight_clip_options is not JSON"),
        (["--quantize", "--module_overrides", "[1]"], "--module_overrides must be a JSON object"),
        (["--quantize", "--activation_granularity", '{"value": "token"}'], "write 'channel' or 'attn_head'"),
        (["--dataset_name", "squad"], "either --dataset_name or"),
        (["--dataset_config_name", "plain"], "belongs to --dataset_name"),
        (["--null_score_diff_threshold", "1"], "only with --version_2_with_negative"),
        (["--max_train_samples", "0"], "at least 1"),
        (["--do_eval"], "--validation_file is missing"),
        (["--do_train", "false"], "Nothing to do"),
        (["--do_train", "false", "--do_eval", "--validation_file", "d", "--quantize"], "add --do_train"),
        (
            ["--do_train", "false", "--do_eval", "--validation_file", "d", "--distill_from", "t"],
            "--distill_from is for training: add --do_train",
        ),
        (
            ["--do_train", "false", "--do_eval", "--validation_file", "d", "--resume_from_checkpoint", "last"],
            "--resume_from_checkpoint continues training: add --do_train",
        ),
    ],
)
def test_contradictions(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_arguments([*BASE, *words])


def test_json_file(tmp_path: Path) -> None:
    values: dict[str, Any] = {
        **{"model_name_or_path": "m", "train_file": "t.json", "output_dir": str(tmp_path / "o"), "do_train": True},
        **{"quantize": True, "weight_bits": 5, "activation_bits": "none", "weight_clip": "percentile"},
        **{"weight_clip_options": {"percentile": 99.0}, "learning_rate": 1e-3},
    }
    (tmp_path / "a.json").write_text(json.dumps(values))
    _, data, octav_arguments, _, training = parse_arguments([str(tmp_path / "a.json")])
    config = octav_arguments.to_config()
    assert (config.weight_bits, config.activation_bits) == (5, None)
    assert config.weight_clip_options == {"percentile": 99.0}
    assert (training.learning_rate, data.max_seq_length, data.doc_stride) == (1e-3, 384, 128)


def test_every_field_of_the_config_is_an_argument_with_its_help() -> None:
    asked_for = {field.name: field for field in dataclasses.fields(OctavConfig) if field.name not in WRITTEN_FIELDS}
    arguments = {field.name: field for field in dataclasses.fields(OctavArguments)}
    own = {"quantize", "static_clip_batches", "learned_clips", "reconstruct_batches", "log_quantization"}
    assert arguments.keys() - own == asked_for.keys() - {"quant_method"}
    assert all(
        asked_for[name].metadata["help"] in arguments[name].metadata["help"] for name in arguments if name in asked_for
    )
    words = ["--embedding_bits", "6", "--weight_granularity", "tensor", "--unsigned_activations", "false"]
    lists = ["--target_modules", "query", "value", "--first_last_bits", "none"]
    config = octav("--quantize", *words, "--sync_activation_clips", "true", *lists).to_config()
    assert (config.target_modules, config.first_last_bits) == (["query", "value"], None)
    assert (config.embedding_bits, config.weight_granularity, config.unsigned_activations) == (6, "tensor", False)
    assert config.sync_activation_clips


def test_data_is_required() -> None:
    with pytest.raises(ValueError, match="either --dataset_name or"):
        DataArguments()


def test_folder_in_use_is_reported_before_anything_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(FileExistsError, match="--resume_from_checkpoint"):
        main(["--model_name_or_path", "nowhere", "--train_file", "none", "--output_dir", str(tmp_path), "--do_train"])


def test_a_checkpoint_that_is_not_whole_is_reported_before_anything_is_loaded(tmp_path: Path) -> None:
    words = ["--model_name_or_path", "nowhere", "--train_file", "none", "--output_dir", str(tmp_path), "--do_train"]
    folder = tmp_path / "checkpoint-2"
    with pytest.raises(ValueError, match="checkpoint-2 is not a checkpoint: there is no such folder.*last"):
        main([*words, "--resume_from_checkpoint", str(folder)])
    folder.mkdir()
    with pytest.raises(
        ValueError, match="checkpoint-2 is not a complete checkpoint: trainer_state.json is missing.*last"
    ):
        main([*words, "--resume_from_checkpoint", str(folder)])


def test_last_starts_from_the_beginning_unless_a_model_is_there(tmp_path: Path) -> None:
    def resume(folder: Path) -> None:
        words = ["--output_dir", str(folder), "--resume_from_checkpoint", "last"]
        training = parse_arguments([*BASE, *words])[-1]
        assert checkpoint_to_resume(training) is None
        check_output_dir(training, None)

    resume(tmp_path / "absent")
    resume(tmp_path)
    (tmp_path / "checkpoint-2").mkdir()  # of a run that was killed in its first save
    (tmp_path / "runs").mkdir()
    resume(tmp_path)
    (tmp_path / "config.json").touch()
    with pytest.raises(FileExistsError, match="contains a model but no complete checkpoint"):
        resume(tmp_path)


def test_help_explains_how_to_resume(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_arguments(["--help"])
    assert "--resume_from_checkpoint last uses the newest complete checkpoint" in " ".join(
        capsys.readouterr().out.split()
    )
