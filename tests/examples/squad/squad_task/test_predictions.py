"""From logits to answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from squad_task.dataset import read_squad_file
from squad_task.features import Windows, evaluation_features, training_features
from squad_task.metric import SquadMetric
from squad_task.predictions import Predictions, predict_answers
from transformers import PreTrainedTokenizerBase

# one question, "abc def ghi jkl" in one window: CLS, question, SEP, four words, SEP, one column of batch padding
ROWS = Dataset.from_dict({"id": ["q"], "context": ["abc def ghi jkl"]})
OFFSETS = [None, None, None, [0, 3], [4, 7], [8, 11], [12, 15], None]
WINDOW = Dataset.from_list([{"example_id": "q", "null_index": 0, "offset_mapping": OFFSETS}])
START = np.array([[2.0, 9, 9, 1, 5, 0, 0, 9, 9]])
END = np.array([[1.0, 9, 9, 4, 0, 3, 2, 9, 9]])


def predict(start: np.ndarray = START, end: np.ndarray = END, **options: Any) -> Predictions:
    return predict_answers(ROWS, WINDOW, start, end, **options)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("length", [40, 128])
def test_perfect_logits_give_the_gold_answers(
    dev_examples: Dataset, tokenizer: PreTrainedTokenizerBase, side: str, length: int
) -> None:
    tokenizer.padding_side = side
    assert round_trip(dev_examples, tokenizer, Windows(length, 12)) == {"exact_match": 100.0, "f1": 100.0}


@pytest.mark.needs_shared
def test_perfect_logits_on_real_questions(shared_squad: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = read_squad_file(shared_squad / "dev-v1.1.json").shuffle(seed=0).select(range(200))
    assert round_trip(rows, tokenizer, Windows())["f1"] > 99.5  # a few answers end inside a word


def round_trip(rows: Dataset, tokenizer: PreTrainedTokenizerBase, windows: Windows) -> dict[str, float]:
    """Score of noise plus a peak at each labelled answer; windows without the answer have noise only."""
    labels, features = training_features(rows, tokenizer, windows), evaluation_features(rows, tokenizer, windows)
    noise = np.random.default_rng(0).normal(size=(2, len(features), windows.max_seq_length))
    for row, (label, null) in enumerate(zip(labels, features["null_index"], strict=True)):
        peak = 0.0 if label["start_positions"] == null else 30.0
        noise[0, row, label["start_positions"]] += peak
        noise[1, row, label["end_positions"]] += peak
    texts = predict_answers(rows, features, noise[0], noise[1]).texts
    result = SquadMetric("squad").compute(
        predictions=[{"id": i, "prediction_text": text} for i, text in texts.items()],
        references=[{"id": row["id"], "answers": row["answers"]} for row in rows],
    )
    assert result is not None
    return result


def test_nbest_is_every_valid_span_by_score() -> None:
    nbest = predict().nbest["q"]
    # start logits of the words 1 5 0 0, end logits 4 0 3 2; the large logits outside the context do not count
    assert [(c["text"], c["score"]) for c in nbest[:4]] == [
        ("def ghi", 8.0),
        ("def ghi jkl", 7.0),
        ("abc", 5.0),
        ("def", 5.0),
    ]
    assert len(nbest) == 10
    assert [c["score"] for c in nbest] == sorted((c["score"] for c in nbest), reverse=True)
    assert sum(c["probability"] for c in nbest) == pytest.approx(1.0)
    assert nbest[0]["probability"] / nbest[1]["probability"] == pytest.approx(np.e)
    assert nbest[0]["offsets"] == [4, 11]


def test_n_best_size_limits_the_list() -> None:
    assert [c["text"] for c in predict(n_best_size=2).nbest["q"]] == ["def ghi", "def ghi jkl"]


@pytest.mark.parametrize(("longest", "text"), [(1, {"abc", "def"}), (2, {"def ghi"})])
def test_max_answer_length_counts_tokens(longest: int, text: set[str]) -> None:
    prediction = predict(max_answer_length=longest)
    assert prediction.texts["q"] in text
    assert max(len(c["text"].split()) for c in prediction.nbest["q"]) == longest


def test_best_window_wins() -> None:
    windows = Dataset.from_list(
        [
            {"example_id": "q", "null_index": 0, "offset_mapping": [None, [0, 3], [4, 7]]},
            {"example_id": "q", "null_index": 0, "offset_mapping": [None, [4, 7], [8, 11]]},
        ]
    )
    start, end = np.array([[0.0, 1, 2], [0, 6, 0]]), np.array([[0.0, 1, 2], [0, 1, 0]])
    prediction = predict_answers(ROWS, windows, start, end)
    assert prediction.texts == {"q": "def"}
    assert [c["score"] for c in prediction.nbest["q"] if c["text"] == "def"] == [7.0]  # once, at its better score


@pytest.mark.parametrize(("threshold", "text"), [(-6.0, ""), (-5.0, "def ghi"), (0.0, "def ghi")])
def test_v2_threshold(threshold: float, text: str) -> None:
    # no answer: 2 + 1 = 3; best span: 8
    prediction = predict(version_2_with_negative=True, null_score_diff_threshold=threshold)
    assert prediction.texts["q"] == text
    assert prediction.null_odds["q"] == -5.0
    null = next(c for c in prediction.nbest["q"] if c["text"] == "")
    assert null["score"] == 3.0
    assert prediction.null_probability["q"] == null["probability"]


def test_context_without_tokens_gives_no_answer() -> None:
    window = Dataset.from_list([{"example_id": "q", "null_index": 0, "offset_mapping": [None, None]}])
    prediction = predict_answers(ROWS, window, np.zeros((1, 2)), np.zeros((1, 2)))
    assert prediction.texts == {"q": ""}
    assert prediction.nbest == {"q": []}


def test_nan_is_an_error() -> None:
    bad = START.copy()
    bad[0, 4] = np.nan
    with pytest.raises(ValueError, match="'q'.*NaN"):
        predict(start=bad)


def test_shapes_must_fit() -> None:
    with pytest.raises(ValueError, match="1 features"):
        predict(start=np.zeros((2, 9)), end=np.zeros((2, 9)))


def test_files(tmp_path: Path) -> None:
    prediction = predict(version_2_with_negative=True)
    prediction.write(tmp_path / "new", "eval")
    assert json.loads((tmp_path / "new/eval_predictions.json").read_text()) == {"q": "def ghi"}
    assert json.loads((tmp_path / "new/eval_nbest_predictions.json").read_text()) == prediction.nbest
    assert json.loads((tmp_path / "new/eval_null_odds.json").read_text()) == {"q": -5.0}
    predict().write(tmp_path / "v1", "eval")
    assert not (tmp_path / "v1/eval_null_odds.json").exists()
