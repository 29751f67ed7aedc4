"""The script from end to end, and its tables."""

from __future__ import annotations

import copy
import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from clip_measurements.report import markdown_report
from measure_clips import _rounded, main
from squad_files import DATA
from transformers import AutoModelForQuestionAnswering, AutoTokenizer

import octav_hf

ARTEFACTS = [
    "clips.md",
    *(
        f"{name}.{ending}"
        for name in ("clip_per_layer", "mse_per_layer", "convergence", "second_minimum")
        for ending in ("png", "svg")
    ),
]


def words(model: str, folder: Path, *more: str) -> list[str]:
    data = ["--train_file", str(DATA / "train.json"), "--max_seq_length", "64", "--doc_stride", "16"]
    return ["--model_name_or_path", model, "--output_dir", str(folder), *data, "--max_samples", "2", *more]


@pytest.fixture(scope="module")
def measured(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder of a run on a float model at two numbers of bits, and its record."""
    folder = tmp_path_factory.mktemp("clips")
    return folder, main(words(tiny_model, folder, "--bits", "4", "2", "--repetitions", "1"))


def test_every_tensor_of_a_float_model_is_measured(measured: tuple[Path, dict[str, Any]]) -> None:
    folder, record = measured
    assert record == json.loads((folder / "clips.json").read_text(encoding="utf-8"))
    assert [entry["bits"] for entry in record["measured"]] == [2, 4]
    kinds = Counter(row["kind"] for row in record["measured"][0]["tensors"])
    # two layers of six weights, four inputs (query, key and value read the same) and four attention operands; the head
    assert kinds == {"weight": 13, "input": 9, "query": 2, "key": 2, "probabilities": 2, "value": 2}
    for entry in record["measured"]:
        for row in entry["tensors"]:
            assert row["signed"] == (row["kind"] != "probabilities")
            assert row["rows"] == (row["shape"][0] if row["kind"] == "weight" else None)
            assert 0 < row["mse"]["best"] <= row["mse"]["sweep"] * (1 + 1e-6)
            assert row["octav_to_fixed_point"] < 1e-5
        assert [chosen["kind"] for chosen in entry["sequences"]] == ["weight", "input", "probabilities"]
        assert all(len(s) == 20 for chosen in entry["sequences"] for s in chosen["sequences"].values())
    assert record["seed"] == 0
    assert record["hardware"]["threads"] == torch.get_num_threads()
    assert {"torch", "matplotlib"} <= set(record["versions"])
    assert sorted(path.name for path in folder.iterdir()) == sorted(["clips.json", *ARTEFACTS])


def test_the_tables_say_what_was_measured(measured: tuple[Path, dict[str, Any]]) -> None:
    folder, record = measured
    text = (folder / "clips.md").read_text(encoding="utf-8")
    keys = [row for row in record["measured"][1]["tensors"] if row["kind"] == "key"]
    ratios = [row["mse"]["octav"] / row["mse"]["best"] for row in keys]
    assert f"| 4 | key | 2 | {sum(ratios) / 2:.3f} | {max(ratios):.3f} |" in text
    weights = [row["seconds"] for row in record["measured"][0]["tensors"] if row["kind"] == "weight"]
    octav, sweep = (1000 * sum(row[name] for row in weights) / 13 for name in ("octav", "sweep"))
    line = next(line for line in text.splitlines() if line.startswith("| 2 | 13 weight tensors"))
    cells = [cell.strip() for cell in line.split("|")]
    assert (cells[3], cells[5], cells[6]) == (f"{octav:.3f}", f"{sweep:.1f}", f"{sweep / octav:.0f}")
    assert "| paper, BERT-Base, NumPy: weight tensors |  | 191 | 1943 |  | 10.2 |" in text


def test_tables_and_plots_come_from_the_file_alone(measured: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, _ = measured
    alone = tmp_path / "alone" / "clips.json"
    alone.parent.mkdir()
    alone.write_bytes((folder / "clips.json").read_bytes())
    main(["--render", str(alone)])
    for name in ARTEFACTS:
        assert (alone.parent / name).read_bytes() == (folder / name).read_bytes(), name


def test_a_row_without_error_has_an_empty_ratio(measured: tuple[Path, dict[str, Any]]) -> None:
    record = copy.deepcopy(measured[1])
    for entry in record["measured"]:
        for row in entry["tensors"]:
            if row["kind"] == "key":
                row["mse"]["best"] = 0.0
    assert "| 4 | key | 2 |  |  |  |  |  |  |" in markdown_report(record)


def test_a_quantized_model_is_taken_as_it_is(tiny_model: str, tmp_path: Path) -> None:
    model = AutoModelForQuestionAnswering.from_pretrained(tiny_model)
    octav_hf.apply_octav(model, octav_hf.OctavConfig(None, 3, embedding_bits=4)).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path)
    record = main(words(str(tmp_path), tmp_path / "clips", "--bits", "4", "8", "--repetitions", "1"))
    assert record["quantized"] == "as it was"
    four, eight = (entry["tensors"] for entry in record["measured"])
    kinds = Counter(row["kind"] for row in four)
    assert kinds == {"embedding": 3, "input": 9, "query": 2, "key": 2, "probabilities": 2, "value": 2}
    assert all(row["rows"] == math.prod(row["shape"][:-1]) for row in four if row["kind"] == "embedding")
    # the same tensors, whatever the number of bits they are measured at
    assert [row["clips"]["max"] for row in four] == [row["clips"]["max"] for row in eight]
    assert all(b["mse"]["best"] < a["mse"]["best"] for a, b in zip(four, eight, strict=True))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--bits", "4", "9"], "argument --bits: invalid choice: 9"),
        (["--bits", "1"], "argument --bits: invalid choice: 1"),
        (["--max_samples", "0"], "--max_samples must be at least 1, not 0"),
        (["--repetitions", "0"], "--repetitions must be at least 1, not 0"),
        (["--render", "nothing.json"], "--model_name_or_path, --train_file, --max_samples.* would be ignored"),
    ],
)
def test_bad_arguments(more: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(words("m", tmp_path, *more))
    assert re.search(message, capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


def test_missing_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--model_name_or_path", "m"])
    assert "--train_file, --output_dir missing" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--render", str(tmp_path / "clips.json")])
    assert "there is no file" in capsys.readouterr().err


def test_measurements_are_not_overwritten(tiny_model: str, tmp_path: Path) -> None:
    (tmp_path / "clips.json").write_text("{}", encoding="utf-8")
    with pytest.raises(FileExistsError, match="Choose another --output_dir"):
        main(words(tiny_model, tmp_path))
    with pytest.raises(ValueError, match=r"not a clips\.json of this script"):
        main(["--render", str(tmp_path / "clips.json")])
    assert [path.name for path in tmp_path.iterdir()] == ["clips.json"]


def test_numbers_that_json_does_not_know_are_left_out() -> None:
    assert _rounded({"a": [math.nan, 1 / 3], "b": math.inf, "c": 7}) == {"a": [None, 0.3333333], "b": None, "c": 7}
