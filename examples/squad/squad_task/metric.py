"""The scores of SQuAD v1.1 and v2.0 as an `evaluate.Metric` that downloads nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import datasets
import evaluate

from squad_task.scores import scores_v1, scores_v2


class SquadMetric(evaluate.Metric):
    """SQuAD's scores; `config_name` is "squad" (v1.1) or "squad_v2" (v2.0).

    `compute(predictions=..., references=...)` takes a list of `{"id", "prediction_text"}` (for squad_v2 also
    `"no_answer_probability"`, in all rows or in none) and a list of `{"id", "answers": {"text", "answer_start"}}`. It
    returns percentages:

    - squad: `exact_match`, `f1`;
    - squad_v2: `exact`, `f1`, `total`, the same as `HasAns_*` and `NoAns_*` if there are such questions, and, if
      `no_answer_probability` is given, `best_exact`, `best_exact_thresh`, `best_f1`, `best_f1_thresh`: the best scores
      that are possible if predictions with a probability above a threshold are replaced with "no answer".
      `compute(no_answer_threshold=...)` (default 1.0) replaces them.

    `compute` raises `ValueError` if an id is repeated, or occurs only among predictions or only among references.
    """

    def __init__(self, config_name: str = "squad", keep_in_memory: bool = True, **kwargs: Any) -> None:
        if config_name not in ("squad", "squad_v2"):
            raise ValueError(f'config_name is "squad" or "squad_v2", not {config_name!r}.')
        super().__init__(config_name=config_name, keep_in_memory=keep_in_memory, **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        answers = {"text": datasets.List(text), "answer_start": datasets.List(datasets.Value("int32"))}
        prediction = {"id": text, "prediction_text": text}
        if self.config_name == "squad_v2":
            prediction["no_answer_probability"] = datasets.Value("float32")
        return evaluate.MetricInfo(
            description=__doc__ or "",
            citation="Rajpurkar et al. 2016 (v1.1), Rajpurkar, Jia and Liang 2018 (v2.0)",
            inputs_description=type(self).__doc__ or "",
            features=datasets.Features({"predictions": prediction, "references": {"id": text, "answers": answers}}),
        )

    def add_batch(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> None:
        """Add predictions and references, laid out as for `compute`."""
        if self.config_name == "squad_v2" and predictions is not None:
            predictions = [{"no_answer_probability": None, **row} for row in predictions]
        super().add_batch(predictions=predictions, references=references, **kwargs)

    def add(self, *, prediction: Any = None, reference: Any = None, **kwargs: Any) -> None:
        """Add one prediction and its reference, laid out as for `compute`."""
        if self.config_name == "squad_v2" and prediction is not None:
            prediction = {"no_answer_probability": None, **prediction}
        super().add(prediction=prediction, reference=reference, **kwargs)

    def _compute(
        self,
        predictions: Sequence[dict[str, Any]],
        references: Sequence[dict[str, Any]],
        no_answer_threshold: float = 1.0,
    ) -> dict[str, float]:
        given = _by_id(predictions, "prediction")
        wanted = {identifier: row["answers"]["text"] for identifier, row in _by_id(references, "reference").items()}
        if given.keys() != wanted.keys():
            only = sorted(given.keys() ^ wanted.keys())
            raise ValueError(
                f"{len(only)} ids are not in both predictions and references, such as {only[:3]}. "
                f"Give exactly one prediction for each reference."
            )
        texts = {identifier: row["prediction_text"] for identifier, row in given.items()}
        if self.config_name == "squad":
            return scores_v1(texts, wanted)
        probabilities = {identifier: row.get("no_answer_probability") for identifier, row in given.items()}
        return scores_v2(texts, wanted, probabilities, no_answer_threshold)


def score_answers(
    examples: datasets.Dataset, texts: dict[str, str], null_probability: dict[str, float]
) -> dict[str, float]:
    """Scores of `SquadMetric`: v2.0 if null probabilities are given, otherwise v1.1."""
    predictions: list[dict[str, Any]] = [{"id": i, "prediction_text": text} for i, text in texts.items()]
    for prediction in predictions if null_probability else []:
        prediction["no_answer_probability"] = null_probability[prediction["id"]]
    references = [{"id": i, "answers": a} for i, a in zip(examples["id"], examples["answers"], strict=True)]
    metric = SquadMetric(config_name="squad_v2" if null_probability else "squad")
    scores = metric.compute(predictions=predictions, references=references)
    assert scores is not None  # None is only for distributed metrics
    return scores


def _by_id(rows: Sequence[dict[str, Any]], kind: str) -> dict[str, dict[str, Any]]:
    table = {row["id"]: row for row in rows}
    if len(table) < len(rows):
        repeated = [identifier for identifier, n in Counter(row["id"] for row in rows).items() if n > 1]
        raise ValueError(f"More than one {kind} for the ids {repeated[:3]}. Give one for each question.")
    if not table:
        raise ValueError(f"There is no {kind} to score.")
    return table
