"""The comparison: what it runs, how it resumes, and how it reports a failure."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import compare
import pytest
from squad_table import markdown_table

MODEL = ["--model_name_or_path", "m"]


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Replaces the subprocess: records each command and writes made-up results."""
    commands: list[list[str]] = []

    def stream(command: list[str], log: Path) -> tuple[int, str]:
        commands.append(command)
        folder = Path(command[command.index("--output_dir") + 1])
        folder.mkdir()
        values = {
            "eval_f1": 90.0,
            "eval_exact_match": 80.0,
            "train_loss": 1.0,
            "train_step_seconds_median": len(commands),
        }
        (folder / "all_results.json").write_text(json.dumps(values))
        return 0, ""

    monkeypatch.setattr(compare, "stream", stream)
    return commands


def options(command: list[str]) -> dict[str, str]:
    return {a: b for a, b in pairwise(command) if a.startswith("--")}


def test_runs_differ_in_quantization_alone(runs: list[list[str]], tmp_path: Path) -> None:
    rows = compare.main([*MODEL, "--bits", "4", "8", "--output_dir", str(tmp_path), "--seed", "3"])
    assert [(row["method"], row["bits"]) for row in rows] == [
        ("fp32", None),
        ("octav", 4),
        ("octav", 8),
        ("max", 4),
        ("max", 8),
    ]
    own = {"--output_dir", "--quantize", "--weight_clip", "--activation_clip", "--weight_bits", "--activation_bits"}
    shared = [{k: v for k, v in options(command).items() if k not in own} for command in runs]
    assert all(values == shared[0] for values in shared)
    assert shared[0]["--seed"] == "3"
    assert "--quantize" not in runs[0]
    last = options(runs[4])
    assert (last["--weight_bits"], last["--activation_bits"], last["--weight_clip"]) == ("8", "8", "max")


def test_results_are_written(runs: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compare.main([*MODEL, "--methods", "fp32", "max", "--output_dir", str(tmp_path)])
    record = json.loads((tmp_path / "results.json").read_text())
    assert record["rows"][1]["eval_f1"] == 90.0
    assert record["seed"] == 0
    assert record["versions"]["torch"]
    table = (tmp_path / "results.md").read_text()
    assert "| max | 4/4 | 90.00 | 80.00 | 1.000 | 2.000 | 2.00 |" in table
    assert table in capsys.readouterr().out


def test_recipe_and_data_can_be_replaced(runs: list[list[str]], tmp_path: Path) -> None:
    words = ["--methods", "fp32", "--output_dir", str(tmp_path), "--learning_rate=1e-5", "--train_file", "t.json"]
    compare.main([*MODEL, *words])
    assert "--learning_rate" not in runs[0]
    assert "--learning_rate=1e-5" in runs[0]
    assert options(runs[0])["--train_file"] == "t.json"
    assert "--validation_file" not in runs[0]


def test_finished_runs_are_not_repeated(runs: list[list[str]], tmp_path: Path) -> None:
    words = [*MODEL, "--output_dir", str(tmp_path)]
    first = compare.main([*words, "--methods", "fp32"])
    both = compare.main([*words, "--methods", "fp32", "octav"])
    assert len(runs) == 2
    assert both[0] == first[0]


def test_interrupted_run_is_repeated(runs: list[list[str]], tmp_path: Path) -> None:
    words = [*MODEL, "--output_dir", str(tmp_path), "--methods", "fp32"]
    compare.main(words)
    (tmp_path / "fp32.finished").unlink()
    compare.main(words)
    assert len(runs) == 2
    assert (tmp_path / "fp32.interrupted0").is_dir()


def test_other_arguments_in_the_same_folder(runs: list[list[str]], tmp_path: Path) -> None:
    words = [*MODEL, "--output_dir", str(tmp_path), "--methods", "octav", "fp32"]
    compare.main([*words[:-1]])
    with pytest.raises(ValueError, match="other arguments.*another --output_dir"):
        compare.main([*words, "--learning_rate", "1e-5"])
    assert len(runs) == 1


def test_foreign_folder_is_left_alone(runs: list[list[str]], tmp_path: Path) -> None:
    (tmp_path / "fp32").mkdir()
    with pytest.raises(ValueError, match="not made by this script"):
        compare.main([*MODEL, "--output_dir", str(tmp_path), "--methods", "fp32"])


def test_failed_run_shows_status_and_log(tmp_path: Path) -> None:
    words = ["--methods", "fp32", "--output_dir", str(tmp_path), "--train_file", str(tmp_path / "none.json")]
    with pytest.raises(RuntimeError, match=r"(?s)fp32 failed with exit status 1.*--validation_file is missing"):
        compare.main([*MODEL, *words])
    assert "--validation_file is missing" in (tmp_path / "fp32.log").read_text()


def test_quantization_options_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--weight_bits cannot be set here"):
        compare.main([*MODEL, "--output_dir", str(tmp_path), "--weight_bits", "3"])


def test_table_without_fp32_and_without_times() -> None:
    row: dict[str, Any] = {"method": "octav", "bits": 4, "eval_f1": 1.0, "eval_exact": 2.0, "train_loss": 3.0}
    assert markdown_table([row]).splitlines()[-1] == "| octav | 4/4 | 1.00 | 2.00 | 3.000 |  |  |"
