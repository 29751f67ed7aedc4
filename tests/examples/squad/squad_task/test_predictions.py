"""Answers computed from logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from squad_files import examples
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


@pytest.mark.parametrize("blank", [[4, 4], [3, 4], [3, 5]], ids=str)
def test_a_span_of_blanks_is_no_candidate(blank: list[int]) -> None:
    rows = Dataset.from_dict({"id": ["q"], "context": ["red  car"]})
    window = Dataset.from_list([{"example_id": "q", "null_index": 0, "offset_mapping": [None, [0, 3], blank, [5, 8]]}])
    start, end = np.array([[1.0, 0, 3, 0]]), np.array([[1.0, 0, 3, 2]])  # no answer 2, red 0, blank 6, car 2
    words = {"max_answer_length": 1, "n_best_size": 1}
    assert predict_answers(rows, window, start, end, **words).texts == {"q": "car"}
    words = {"max_answer_length": 1, "version_2_with_negative": True}
    prediction = predict_answers(rows, window, start, end, **words)
    assert [(c["text"], c["offsets"]) for c in prediction.nbest["q"]] == [
        ("car", [5, 8]),
        ("", [0, 0]),
        ("red", [0, 3]),
    ]
    assert prediction.null_odds["q"] == 0.0
    assert prediction.null_probability["q"] == pytest.approx(np.e**2 / (2 * np.e**2 + 1))


def test_blanks_within_an_answer_stay(byte_tokenizer: PreTrainedTokenizerBase) -> None:
    rows = examples("red   car ", "red", "car", "red   car")
    features = evaluation_features(rows, byte_tokenizer, Windows(16, 2, 4, False))
    logits = np.zeros((1, len(features["offset_mapping"][0])))
    texts = {c["text"] for c in predict_answers(rows, features, logits, logits, 100).nbest["q1"]}
    assert {"red", "car", "red   car"} <= {text.strip() for text in texts} - {""}
    assert all(text.strip() for text in texts)


@pytest.mark.parametrize("offsets", [[None, None], [None, [0, 1], [1, 1]]], ids=["none", "blanks"])
def test_context_without_text_gives_no_answer(tmp_path: Path, offsets: list[list[int] | None]) -> None:
    rows = Dataset.from_dict({"id": ["q"], "context": ["  "]})
    window = Dataset.from_list([{"example_id": "q", "null_index": 0, "offset_mapping": offsets}])
    logits = np.array([[-5.0, 0, 0][: len(offsets)]])
    prediction = predict_answers(rows, window, logits, logits)
    assert prediction.texts == {"q": ""}
    assert prediction.nbest == {"q": []}
    prediction = predict_answers(rows, window, logits, logits, version_2_with_negative=True)
    assert prediction.texts == {"q": ""}
    assert prediction.null_probability == {"q": 1.0}
    prediction.write(tmp_path, "eval")
    odds = json.loads((tmp_path / "eval_null_odds.json").read_text(), parse_constant=pytest.fail)
    assert odds["q"] > 1e300


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
