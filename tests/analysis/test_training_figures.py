"""Figures of a log, from statistics with chosen values."""

from __future__ import annotations

import math

import pytest

from octav_hf.analysis.training_figures import per_layer, summary

from .made_statistics import statistics, unreached

STATISTICS = [
    statistics("a", "weight", sqnr_db=10.0, clipped_share=0.1, clip=2.0),
    statistics("b", "weight", sqnr_db=16.0, clipped_share=0.4, clip=3.0),
    statistics("c", "weight", sqnr_db=math.inf, clipped_share=0.1, clip=1.0),  # without error
    statistics("a", "input", sqnr_db=7.0, clipped_share=0.0, clip=0.5),
    statistics("s", "key", sqnr_db=5.0, clipped_share=0.3, clip=6.0),
    unreached("s", "value"),
]
CHANGED = {"a": 0.25, "b": 0.05}
FIRST_CLIPS = {("a", "weight"): 4.0, ("b", "weight"): 2.0, ("a", "input"): 0.5, ("s", "key"): 1.5, ("s", "value"): 1.0}


def test_summary() -> None:
    """Means over the operands that have the figure, extremes, and which operand has each."""
    values, operands = summary(STATISTICS, CHANGED, FIRST_CLIPS)
    assert values == {
        f"octav/{name}": pytest.approx(value)
        for name, value in {
            "weight_sqnr_db_mean": 13.0,
            "weight_sqnr_db_min": 10.0,
            "weight_clipped_share_mean": 0.2,
            "weight_clipped_share_max": 0.4,
            "weight_clip_ratio_mean": 1.0,  # of 0.5 and 1.5
            "weight_clip_ratio_min": 0.5,
            "weight_clip_ratio_max": 1.5,
            "weight_changed_codes_mean": 0.15,
            "weight_changed_codes_min": 0.05,
            "activation_sqnr_db_mean": 6.0,
            "activation_sqnr_db_min": 5.0,
            "activation_clipped_share_mean": 0.15,
            "activation_clipped_share_max": 0.3,
            "activation_clip_ratio_mean": 2.5,
            "activation_clip_ratio_min": 1.0,
            "activation_clip_ratio_max": 4.0,
        }.items()
    }
    assert operands == {
        "octav/weight_sqnr_db_min_operand": "a weight",
        "octav/weight_clipped_share_max_operand": "b weight",
        "octav/weight_clip_ratio_min_operand": "a weight",
        "octav/weight_clip_ratio_max_operand": "b weight",
        "octav/weight_changed_codes_min_operand": "b weight",
        "octav/activation_sqnr_db_min_operand": "s key",
        "octav/activation_clipped_share_max_operand": "s key",
        "octav/activation_clip_ratio_min_operand": "a input",
        "octav/activation_clip_ratio_max_operand": "s key",
    }


def test_per_layer() -> None:
    """Every figure that is a finite number."""
    assert per_layer(STATISTICS[2:], CHANGED) == {
        "octav/c/weight/clipped_share": 0.1,
        "octav/c/weight/clip": 1.0,
        "octav/a/input/sqnr_db": 7.0,
        "octav/a/input/clipped_share": 0.0,
        "octav/a/input/clip": 0.5,
        "octav/s/key/sqnr_db": 5.0,
        "octav/s/key/clipped_share": 0.3,
        "octav/s/key/clip": 6.0,
        "octav/a/weight/changed_codes": 0.25,
        "octav/b/weight/changed_codes": 0.05,
    }
