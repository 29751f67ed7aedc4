"""``follow_suggestion.py`` on a tiny model: the second run has the config that the first suggestion's code makes."""

from __future__ import annotations

import json
from pathlib import Path

import follow_suggestion
import hold_out
import pytest
from transformers import AutoModelForQuestionAnswering

TRAIN = Path(follow_suggestion.__file__).parent / "data" / "train.json"


def test_the_first_suggestion_is_followed(
    tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(follow_suggestion, "minilm_folder", lambda: tiny_model)
    hold_out.main(["--train_file", str(TRAIN), "--questions", "8", "--output_dir", str(tmp_path / "data")])
    few = ["--max_train_samples", "8", "--max_eval_samples", "4", "--max_steps", "1", "--use_cpu", "true"]
    arguments = ["--data", str(tmp_path / "data"), "--output_dir", str(tmp_path), "--batches", "1", *few]
    [line] = follow_suggestion.main(arguments)
    first, second = (
        AutoModelForQuestionAnswering.from_pretrained(tmp_path / f"{name}-seed0").octav_config
        for name in ("paper", "suggested")
    )
    names = {"model": AutoModelForQuestionAnswering.from_pretrained(tiny_model)}
    exec(line["suggestions"][0]["code"], names)
    assert second == names["config"] != first
    for index, name in enumerate(("paper", "suggested")):
        metrics = json.loads((tmp_path / f"{name}-seed0" / "all_results.json").read_text(encoding="utf-8"))
        assert line["f1"][index] == metrics["eval_f1"]
    assert len(line["worst"]) == follow_suggestion.WORST
    assert [line] == follow_suggestion.main(arguments)  # nothing is run again
    assert f"| 0 | {line['f1'][0]:.2f} | {line['f1'][1]:.2f} |" in capsys.readouterr().out
