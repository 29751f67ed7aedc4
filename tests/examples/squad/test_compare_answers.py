"""Differences between the answers of two forms, on hand-written lists."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from compare_answers import differences, main, rows_of


def nbest(**questions: list[tuple[int, float]]) -> dict[str, list[dict[str, Any]]]:
    """n-best lists of (first character, score) pairs."""
    rest = {"text": "", "probability": 0.0}
    return {
        name: [{"score": score, "offsets": [first, first + 1], **rest} for first, score in spans]
        for name, spans in questions.items()
    }


def test_moves_and_changes() -> None:
    simulated = nbest(same=[(0, 3.0), (5, 1.0)], near=[(0, 2.0), (5, 1.875)], none=[], far=[(0, 2.0)])
    integer = nbest(same=[(0, 3.125), (5, 0.9375)], near=[(5, 2.0), (0, 1.75)], none=[], far=[(7, 3.0)])
    found = differences(simulated, integer, rounding=0.0625)
    assert found["moved_max"] == 0.25  # of "near", 2 to 1.75
    assert found["moved_median"] == 0.0625  # of 0.25, 0.125, 0 and 0
    # two scores that move by 0.0625 each close a gap of 0.125; how large the gap of "far" is, the list does not say
    assert (found["changed"], found["ties"]) == (2, 1)
    assert differences(simulated, integer, rounding=0.0624)["ties"] == 0


def test_ties_are_what_rounding_moves(tmp_path: Path) -> None:
    simulated = nbest(a=[(0, 2.0), (5, 1.75)], b=[(0, 2.0), (5, 1.0)])
    integer = nbest(a=[(5, 3.0), (0, 1.0)], b=[(5, 3.0), (0, 1.0)])
    run = write_run(tmp_path / "run", eval=simulated, integer=integer)
    assert rows_of(run)[1]["simulated"]["ties"] == 0
    write_run(run, float64=nbest(a=[(0, 2.125), (5, 1.75)], b=[(0, 2.0), (5, 1.0)]))
    rows = {row["form"]: row for row in rows_of(run)}
    assert rows["simulated"]["simulated, float64"]["moved_max"] == 0.125
    assert rows["simulated, float64"]["simulated"]["changed"] == 0
    assert rows["integer"]["simulated"]["changed"] == rows["integer"]["simulated, float64"]["changed"] == 2
    assert rows["integer"]["simulated"]["ties"] == 1  # a gap of 0.25, and one of 1
    assert rows["integer"]["simulated, float64"]["ties"] == 0  # 0.375


def write_run(folder: Path, **forms: dict[str, list[dict[str, Any]]]) -> Path:
    folder.mkdir(exist_ok=True)
    for prefix, lists in forms.items():
        scores = {f"{prefix}_f1": 50.0, f"{prefix}_exact_match": 25.0}
        (folder / f"{prefix}_results.json").write_text(json.dumps(scores))
        (folder / f"{prefix}_nbest_predictions.json").write_text(json.dumps(lists))
    return folder


def test_a_row_for_each_form_that_there_is(tmp_path: Path) -> None:
    lists, moved = nbest(a=[(0, 2.0), (3, 1.0)]), nbest(a=[(0, 2.25), (3, 1.0)])
    runs = [
        write_run(tmp_path / "w4a8", eval=lists, integer=moved),
        write_run(tmp_path / "fp32", eval=lists, onnx=lists),
    ]
    main(["--runs", *map(str, runs), "--output_dir", str(tmp_path / "out")])
    rows = json.loads((tmp_path / "out/answers.json").read_text())["rows"]
    expected = [("w4a8", "simulated"), ("w4a8", "integer"), ("fp32", "simulated"), ("fp32", "onnxruntime")]
    assert [(row["run"], row["form"]) for row in rows] == expected
    assert "| w4a8 | integer | 50.00 | 25.00 | 0 | 0 | 0.25 | 0.25 |  |" in (tmp_path / "out/answers.md").read_text()


def test_different_questions_and_missing_runs_are_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", eval=nbest(a=[(0, 2.0)]), onnx=nbest(b=[(0, 2.0)]))
    with pytest.raises(ValueError, match="different questions"):
        main(["--runs", str(run), "--output_dir", str(tmp_path / "out")])
    with pytest.raises(FileNotFoundError, match="Evaluate the run first"):
        main(["--runs", str(tmp_path / "absent"), "--output_dir", str(tmp_path / "out")])
