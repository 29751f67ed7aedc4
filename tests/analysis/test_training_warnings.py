"""What is warned of and what is not, at the thresholds, from statistics with chosen values."""

from __future__ import annotations

from typing import Any

import pytest

from octav_hf.analysis.training_warnings import TrainingWarnings

from .made_statistics import statistics, unreached


def looks(*measurements: list[Any], **thresholds: Any) -> list[str]:
    """The warnings of several measurements of operands, without changed codes."""
    warnings = TrainingWarnings(**{"clip_factor": 10.0, "dead_sqnr_db": 1.0, "still_logs": 3} | thresholds)
    return [text for measured in measurements for text in warnings.look(measured, {}, set())]


@pytest.mark.parametrize(
    ("clips", "text"),
    [
        ([1.0, 0.11], None),
        ([1.0, 0.09], "Clips that collapsed since the first measurement: a input (1 → 0.09). "),
        ([1.0, 9.0], None),
        ([1.0, 11.0], "Clips that exploded since the first measurement: a input (1 → 11). "),
        ([1.0, 5.0, 9.0], None),
        ([1.0, 5.0, 25.0], "Clips that exploded since the first measurement: a input (1 → 25). "),  # of the first
        ([0.0, 1.0, 5.0], None),  # a clip that begins at 0
        ([1.0, 11.0, 12.0], "Clips that exploded since the first measurement: a input (1 → 11). "),  # once
    ],
)
def test_clips(clips: list[float], text: str | None) -> None:
    texts = looks(*([statistics("a", "input", clip=clip)] for clip in clips))
    assert [each[: len(text or "")] for each in texts] == ([] if text is None else [text])


@pytest.mark.parametrize(("sqnr_db", "warned"), [(1.1, False), (0.9, True), (None, False)])
def test_signal_to_noise(sqnr_db: float | None, warned: bool) -> None:
    texts = looks([statistics("a", "input", sqnr_db=sqnr_db, zero_share=0.75)])
    assert bool(texts) is warned
    assert not warned or "a input (SQNR 0.9 dB, 75% rounded to 0)" in texts[0]


def test_the_same_problem_of_many_operands_is_one_warning() -> None:
    (text,) = looks([statistics(f"layer{number}", "input", lowest=3.0, highest=3.0) for number in range(10)])
    assert "layer7 input (all 1,000 values are 3) and 2 more. " in text
    assert "layer8" not in text


def test_an_operand_that_no_batch_reached() -> None:
    assert looks([unreached("a", "input")]) == []


def still(
    measurements: list[dict[str, float]], elements: dict[str, int], trained: set[str] | None = None
) -> list[tuple[int, str]]:
    """Which measurement of changed codes warned of what."""
    warnings = TrainingWarnings(10.0, 1.0, still_logs=3)
    weights = [statistics(name, "weight", elements=count) for name, count in elements.items()]
    return [
        (number, text.partition(": ")[2].partition(".")[0])
        for number, changed in enumerate(measurements, 1)
        for text in warnings.look(weights, changed, set(elements) if trained is None else trained)
    ]


def test_a_layer_whose_codes_are_still() -> None:
    moving = {"a": 0.0, "b": 0.02}
    # of a's 1,000 codes 10 are expected to change in a log, at the share of all layers, which is 1 %
    assert still([moving] * 4, {"a": 1000, "b": 1000}) == [(3, "a weight (3 logs)")]
    assert still([moving, {"a": 0.001, "b": 0.02}, moving, moving], {"a": 1000, "b": 1000}) == []
    assert still([moving] * 4, {"a": 1000, "b": 1000}, trained={"b"}) == []
    # the share of all layers is of their weights: 2 % of a hundredth is 0.2 codes of a in a log
    assert still([moving] * 9, {"a": 1000, "b": 10}) == []
    # expected codes add up: 2.4 in a log are more than 10 after five
    assert still([moving] * 6, {"a": 120, "b": 10**9}) == [(5, "a weight (5 logs)")]


def test_all_layers_are_still() -> None:
    assert still([{"a": 0.0, "b": 0.0}] * 4, {"a": 10, "b": 10}) == [(3, "a weight (3 logs), b weight (3 logs)")]
