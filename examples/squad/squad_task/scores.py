"""Exact match and F1 of SQuAD v1.1 and v2.0, in plain Python.

The scores follow the official definitions: texts are lower-cased, ASCII punctuation and the articles a, an, the are
removed and blanks are collapsed; a prediction gets its best score over the reference answers. All are percentages.
"""

from __future__ import annotations

import re
import string
from collections import Counter

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize(text: str) -> str:
    """`text` in the form for comparison: lower case, without ASCII punctuation, articles and superfluous blanks."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str, answer: str) -> float:
    """1.0 if the texts are equal after `normalize`, otherwise 0.0."""
    return float(normalize(prediction) == normalize(answer))


def token_f1(prediction: str, answer: str, empty_matches_empty: bool) -> float:
    """Harmonic mean of precision and recall over the words of two texts, in [0, 1].

    Args:
        empty_matches_empty: whether two texts without words score 1 (SQuAD v2.0) or 0 (v1.1).
    """
    predicted, wanted = normalize(prediction).split(), normalize(answer).split()
    if not predicted or not wanted:
        return float(empty_matches_empty and predicted == wanted)
    common = (Counter(predicted) & Counter(wanted)).total()
    # 2PR / (P + R) with P = common / |predicted| and R = common / |wanted|
    return 2 * common / (len(predicted) + len(wanted))


def scores_v1(texts: dict[str, str], answers: dict[str, list[str]]) -> dict[str, float]:
    """`exact_match` and `f1` for texts by question id; `ValueError` if a question has no answer."""
    empty = [identifier for identifier, golds in answers.items() if not golds]
    if empty:
        raise ValueError(
            f'References without an answer, such as {empty[:3]}. Use config_name="squad_v2" for SQuAD v2.0.'
        )
    exact = [max(exact_match(texts[i], gold) for gold in golds) for i, golds in answers.items()]
    f1 = [max(token_f1(texts[i], gold, empty_matches_empty=False) for gold in golds) for i, golds in answers.items()]
    return {"exact_match": _percent(exact), "f1": _percent(f1)}


def scores_v2(
    texts: dict[str, str],
    answers: dict[str, list[str]],
    probabilities: dict[str, float | None],
    threshold: float,
) -> dict[str, float]:
    """Scores of `SquadMetric` for squad_v2; a "no answer" probability above `threshold` replaces the text with ""."""
    # answers that normalize to nothing are ignored; no answer is the answer ""
    golds = {i: [text for text in given if normalize(text)] or [""] for i, given in answers.items()}
    raw = {
        "exact": {i: max(exact_match(texts[i], gold) for gold in golds[i]) for i in golds},
        "f1": {i: max(token_f1(texts[i], gold, empty_matches_empty=True) for gold in golds[i]) for i in golds},
    }
    answerable = {i: bool(given) for i, given in answers.items()}
    known = {i: probability for i, probability in probabilities.items() if probability is not None}
    if known and len(known) < len(texts):
        raise ValueError("Only some predictions have no_answer_probability. Give it for all of them, or for none.")
    groups = {
        "": list(golds),
        "HasAns_": [i for i in golds if answerable[i]],
        "NoAns_": [i for i in golds if not answerable[i]],
    }
    result: dict[str, float] = {}
    for prefix, members in groups.items():
        if not members:
            continue
        for name, scores in raw.items():
            result[prefix + name] = _percent(
                [float(not answerable[i]) if known.get(i, 0.0) > threshold else scores[i] for i in members]
            )
        result[f"{prefix}total"] = len(members)
    if known:
        for name, scores in raw.items():
            result[f"best_{name}"], result[f"best_{name}_thresh"] = _best_threshold(texts, scores, answerable, known)
    return result


def _best_threshold(
    texts: dict[str, str], scores: dict[str, float], answerable: dict[str, bool], probabilities: dict[str, float]
) -> tuple[float, float]:
    """Highest possible score in percent, and its threshold, starting from "answer nothing"."""
    current = best = float(sum(not value for value in answerable.values()))
    threshold = 0.0
    for i in sorted(probabilities, key=lambda identifier: probabilities[identifier]):
        current += scores[i] if answerable[i] else (-1.0 if texts[i] else 0.0)
        if current > best:
            best, threshold = current, probabilities[i]
    return 100.0 * best / len(answerable), threshold


def _percent(values: list[float]) -> float:
    return 100.0 * sum(values) / len(values)
