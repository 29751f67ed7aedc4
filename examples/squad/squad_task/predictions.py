"""Compute answer texts from start and end logits.

Every span of at most `max_answer_length` tokens inside a window is scored (start logit + end logit), not only those
between the best few starts and ends, so that the best span is never missed. A span of blanks only, which some
tokenizers produce, is not an answer. The windows of a question compete.
"""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset


@dataclass(frozen=True)
class Predictions:
    """Answers of a model, by question id.

    Attributes:
        texts: the answer; "" for no answer (with SQuAD v1.1 only if no window has a span).
        nbest: the best candidates, highest score first: `text`, `score` (start logit + end logit), `probability`
            (softmax over the list), `offsets` ([start, end] in characters of the context).
        null_odds: score of "no answer" minus that of the best span, or the largest float if there is no span (SQuAD
            v2.0 only, otherwise empty).
        null_probability: softmax of "no answer" against the candidates (SQuAD v2.0 only, otherwise empty).
    """

    texts: dict[str, str]
    nbest: dict[str, list[dict[str, Any]]]
    null_odds: dict[str, float]
    null_probability: dict[str, float]

    def write(self, folder: str | Path, prefix: str) -> None:
        """Write `{prefix}_predictions.json`, `{prefix}_nbest_predictions.json`, for v2.0 `{prefix}_null_odds.json`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        files: dict[str, Any] = {"predictions": self.texts, "nbest_predictions": self.nbest}
        if self.null_odds:
            files["null_odds"] = self.null_odds
        for name, content in files.items():
            text = json.dumps(content, indent=2, ensure_ascii=False)
            (folder / f"{prefix}_{name}.json").write_text(text + "\n", encoding="utf-8")


def predict_answers(
    examples: Dataset,
    features: Dataset,
    start_logits: np.ndarray,
    end_logits: np.ndarray,
    n_best_size: int = 20,
    max_answer_length: int = 30,
    version_2_with_negative: bool = False,
    null_score_diff_threshold: float = 0.0,
) -> Predictions:
    """Turn logits into answers.

    Args:
        examples: columns as in `squad_task.dataset`, N rows.
        features: `squad_task.features.evaluation_features(examples)`, F rows.
        start_logits, end_logits: (F, T), a row per feature; columns beyond a feature's tokens are padding.
        n_best_size: number of candidates kept for each question.
        max_answer_length: longest answer, in tokens.
        version_2_with_negative: whether "no answer" is possible.
        null_score_diff_threshold: predict "no answer" if its score exceeds that of the best span by more than this.

    Raises:
        ValueError: shapes do not fit, a logit of a token is NaN or infinite, or an option is out of range.
    """
    if n_best_size < 1 or max_answer_length < 1:
        raise ValueError(f"n_best_size {n_best_size} and max_answer_length {max_answer_length} must be at least 1.")
    if start_logits.shape != end_logits.shape or start_logits.ndim != 2 or len(start_logits) != len(features):
        raise ValueError(
            f"Start logits {start_logits.shape} and end logits {end_logits.shape} should both be "
            f"(features, tokens) with {len(features)} features."
        )
    contexts = dict(zip(examples["id"], examples["context"], strict=True))
    spans, null_scores = _span_candidates(contexts, features, start_logits, end_logits, n_best_size, max_answer_length)
    result = Predictions({}, {}, {}, {})
    for identifier, context in contexts.items():
        # overlapping windows may contain the same span; the better score counts
        ranked = sorted(spans[identifier].items(), key=lambda item: (-item[1], item[0]))[:n_best_size]
        candidates = [(context[first:last], score, [first, last]) for (first, last), score in ranked]
        answer = candidates[0][0] if candidates else ""
        if version_2_with_negative:
            no_answer = ("", null_scores[identifier], [0, 0])
            best = candidates[0][1] if candidates else np.finfo(np.float64).min  # JSON has no infinity
            result.null_odds[identifier] = float(no_answer[1] - best)
            if result.null_odds[identifier] > null_score_diff_threshold:
                answer = ""
            candidates = sorted([*candidates, no_answer], key=lambda candidate: -candidate[1])
        scores = np.array([score for _, score, _ in candidates])
        probabilities = np.exp(scores - scores.max()) if len(scores) else scores
        probabilities = probabilities / probabilities.sum()
        result.texts[identifier] = answer
        result.nbest[identifier] = [
            {"text": text, "score": float(score), "probability": float(probability), "offsets": offsets}
            for (text, score, offsets), probability in zip(candidates, probabilities, strict=True)
        ]
        if version_2_with_negative:
            result.null_probability[identifier] = float(probabilities[candidates.index(no_answer)])
    return result


def _span_candidates(
    contexts: dict[str, str],
    features: Dataset,
    start_logits: np.ndarray,
    end_logits: np.ndarray,
    n_best_size: int,
    max_answer_length: int,
) -> tuple[dict[str, dict[tuple[int, int], float]], dict[str, float]]:
    """Best spans of each question as {(first, last character): score}, and its lowest score for "no answer"."""
    spans: dict[str, dict[tuple[int, int], float]] = defaultdict(dict)
    null_scores: dict[str, float] = {}
    columns = features.select_columns(["example_id", "null_index", "offset_mapping"])
    for row, feature in enumerate(columns):
        identifier, offsets, null = feature["example_id"], feature["offset_mapping"], feature["null_index"]
        context = [i for i, offset in enumerate(offsets) if offset is not None]
        start = start_logits[row, : len(offsets)].astype(np.float64)
        end = end_logits[row, : len(offsets)].astype(np.float64)
        if len(start) != len(offsets) or not (np.isfinite(start).all() and np.isfinite(end).all()):
            raise ValueError(
                f"Question {identifier!r}: {len(start)} logits for {len(offsets)} tokens, or some are NaN or infinite. "
                f"If training diverged, lower --learning_rate or raise the number of bits."
            )
        score = float(start[null] + end[null])
        null_scores[identifier] = min(score, null_scores.get(identifier, np.inf))
        if not context:
            continue
        low, count = context[0], len(context)
        # scores[i, d]: the span from context token i to token i + d
        padded = np.concatenate([end[low : low + count], np.full(max_answer_length - 1, -np.inf)])
        scores = start[low : low + count, None] + np.lib.stride_tricks.sliding_window_view(padded, max_answer_length)
        # written[k]: number of non-blank characters among the context's first k
        written = np.cumsum([0, *(not character.isspace() for character in contexts[identifier])])
        before, until = written[np.array(offsets[low : low + count])].T
        padded = np.concatenate([until, np.full(max_answer_length - 1, until[-1])])
        until = np.lib.stride_tricks.sliding_window_view(padded, max_answer_length)
        scores = np.where(until > before[:, None], scores, -np.inf).ravel()
        keep = min(n_best_size, scores.size)
        for flat in np.argpartition(-scores, keep - 1)[:keep]:
            if np.isneginf(scores[flat]):
                continue
            first, length = divmod(int(flat), max_answer_length)
            span = (offsets[low + first][0], offsets[low + first + length][1])
            spans[identifier][span] = max(float(scores[flat]), spans[identifier].get(span, -np.inf))
    return spans, null_scores
