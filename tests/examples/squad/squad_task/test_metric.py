"""Scores against cases worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest
from squad_task.metric import SquadMetric
from squad_task.scores import normalize


def score(config_name: str, cases: list[tuple[str, list[str]]], **options: Any) -> dict[str, float]:
    """Scores of (prediction, gold answers) pairs."""
    predictions = [{"id": str(i), "prediction_text": text} for i, (text, _) in enumerate(cases)]
    references = [
        {"id": str(i), "answers": {"text": golds, "answer_start": [0] * len(golds)}}
        for i, (_, golds) in enumerate(cases)
    ]
    result = SquadMetric(config_name=config_name).compute(predictions=predictions, references=references, **options)
    assert result is not None
    return result


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Eiffel-Tower!", "eiffeltower"),
        ("an apple a day", "apple day"),
        ("Athens, theatre", "athens theatre"),
        ("a.n. other", "other"),  # the point goes first, and leaves an article
        ("“quoted”", "“quoted”"),  # only ASCII punctuation
        ("the", ""),
    ],
)
def test_normalize(text: str, expected: str) -> None:
    assert normalize(text) == expected


@pytest.mark.parametrize(
    ("prediction", "golds", "exact", "f1"),
    [
        ("Denver Broncos", ["Denver Broncos"], 100, 100),
        ("the denver broncos.", ["Denver Broncos"], 100, 100),
        ("Broncos", ["Denver Broncos"], 0, 200 / 3),  # precision 1, recall 1/2
        ("big red dog", ["red dog house park"], 0, 400 / 7),  # precision 2/3, recall 2/4
        ("red red", ["red"], 0, 200 / 3),  # a word counts as often as it is in both
        ("Paris", ["London", "in Paris", "paris"], 100, 100),  # the best of several
        ("Rome", ["Paris"], 0, 0),
        ("", ["Paris"], 0, 0),
        ("the", ["a"], 100, 0),  # v1.1: equal, but without a common word
    ],
)
def test_v1_case(prediction: str, golds: list[str], exact: float, f1: float) -> None:
    assert score("squad", [(prediction, golds)]) == pytest.approx({"exact_match": exact, "f1": f1})


def test_v1_mean() -> None:
    result = score("squad", [("Paris", ["Paris"]), ("Broncos", ["Denver Broncos"]), ("x", ["y"]), ("z", ["z"])])
    assert result == pytest.approx({"exact_match": 50.0, "f1": (100 + 200 / 3 + 0 + 100) / 4})


def test_v1_refuses_a_reference_without_answers() -> None:
    with pytest.raises(ValueError, match="squad_v2"):
        score("squad", [("Paris", [])])


def test_v2_groups() -> None:
    result = score("squad_v2", [("Paris", ["Paris"]), ("", ["Denver Broncos"]), ("", []), ("Rome", []), ("", ["the"])])
    expected = {"exact": 60.0, "f1": 60.0, "total": 5}  # "the" normalizes to nothing, so "" is right
    expected |= {"HasAns_exact": 200 / 3, "HasAns_f1": 200 / 3, "HasAns_total": 3}
    expected |= {"NoAns_exact": 50.0, "NoAns_f1": 50.0, "NoAns_total": 2}
    assert result == pytest.approx(expected)


def test_v2_best_thresholds() -> None:
    # in order of probability: right answer (0.1), half-right (0.3), wrong (0.6), answered though impossible (0.9)
    rows = [("Paris", ["Paris"], 0.1), ("red", ["red dog"], 0.3), ("x", ["y"], 0.6), ("Rome", [], 0.9), ("", [], 0.95)]
    result = SquadMetric(config_name="squad_v2").compute(
        predictions=[
            {"id": str(i), "prediction_text": text, "no_answer_probability": p} for i, (text, _, p) in enumerate(rows)
        ],
        references=[
            {"id": str(i), "answers": {"text": golds, "answer_start": [0] * len(golds)}}
            for i, (_, golds, _) in enumerate(rows)
        ],
    )
    assert result is not None
    # answering nothing is worth 2 of 5; answering the first adds 1; the second adds F1 2/3 but no exact match
    assert result["best_exact"] == pytest.approx(60.0)
    assert result["best_exact_thresh"] == pytest.approx(0.1)
    assert result["best_f1"] == pytest.approx(100 * (3 + 2 / 3) / 5)
    assert result["best_f1_thresh"] == pytest.approx(0.3)


def test_v2_threshold_withdraws_answers() -> None:
    metric = SquadMetric(config_name="squad_v2")
    rows = {
        "predictions": [{"id": "1", "prediction_text": "Rome", "no_answer_probability": 0.8}],
        "references": [{"id": "1", "answers": {"text": [], "answer_start": []}}],
    }
    assert metric.compute(**rows)["exact"] == 0.0  # type: ignore[index]
    assert metric.compute(**rows, no_answer_threshold=0.5)["exact"] == 100.0  # type: ignore[index]


@pytest.mark.parametrize(
    ("predicted", "wanted", "message"),
    [
        (["a", "c"], ["a", "b"], "2 ids are not in both.*'b', 'c'"),
        (["a"], ["a", "b"], "Mismatch in the number"),
        (["a", "b"], ["a"], "Mismatch in the number"),
        (["a", "a"], ["a", "b"], "More than one prediction"),
        (["a", "b"], ["a", "a"], "More than one reference"),
    ],
)
def test_ids_must_agree(predicted: list[str], wanted: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SquadMetric("squad").compute(
            predictions=[{"id": i, "prediction_text": ""} for i in predicted],
            references=[{"id": i, "answers": {"text": ["x"], "answer_start": [0]}} for i in wanted],
        )


def test_unknown_config() -> None:
    with pytest.raises(ValueError, match="squad_v2"):
        SquadMetric(config_name="squad_v3")
