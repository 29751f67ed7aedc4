"""Holding out questions of a SQuAD file: whole paragraphs, without losses or duplicates."""

from __future__ import annotations

import json
from pathlib import Path

import hold_out
import pytest
from squad_task.dataset import read_squad_file

DATA = Path(hold_out.__file__).parent / "data"


def test_the_two_files_are_the_whole_and_share_no_paragraph(tmp_path: Path) -> None:
    hold_out.main(["--train_file", str(DATA / "train.json"), "--questions", "100", "--output_dir", str(tmp_path)])
    whole, train, choices = (
        read_squad_file(path) for path in (DATA / "train.json", tmp_path / "train.json", tmp_path / "choices.json")
    )
    assert [*train["id"], *choices["id"]] == list(whole["id"])
    assert [*train["title"], *choices["title"]] == list(whole["title"])
    assert not {*train["context"]} & {*choices["context"]}
    last_paragraph = list(choices["context"]).count(choices["context"][0])
    assert 100 <= len(choices) < 100 + last_paragraph


def test_nothing_on_one_side_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paragraph = json.loads((DATA / "dev.json").read_text(encoding="utf-8"))["data"][0]["paragraphs"][0]
    (tmp_path / "one.json").write_text(json.dumps({"data": [{"paragraphs": [paragraph]}]}), encoding="utf-8")
    for questions in ("1", "0"):
        with pytest.raises(SystemExit):
            hold_out.main(
                ["--train_file", str(tmp_path / "one.json"), "--questions", questions, "--output_dir", str(tmp_path)]
            )
        assert "leaves nothing on one side" in capsys.readouterr().err
