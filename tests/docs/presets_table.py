"""The table of presets in "Accuracy at 4 bits", from the record of the SQuAD study on a GPU.

``python -m tests.docs.presets_table`` writes it into the page; a test compares the two.
"""

from __future__ import annotations

import json
import statistics
from typing import Any

from .table_in_page import ROOT, TableInPage

RECORD = ROOT / "examples/squad/results/four_bits/results.jsonl"
WIDTHS = ((4, None), (3, None), (2, 8))  # bits of weights, and of activations if they differ
# First cell, then what tells the study's cells apart: clip rule, group size, teacher's features.
ROWS = (
    ("`OctavConfig.paper()`, the default", "octav", None, False),
    ("`OctavConfig.accurate()`", "mse", None, False),
    ("… distilled with features", "mse", None, True),
    ("`OctavConfig.groups()` (groups of 64)", "mse", 64, False),
    ("… distilled with features", "mse", 64, True),
    ("`OctavConfig.groups(group_size=32)`", "mse", 32, False),
    ("… distilled with features", "mse", 32, True),
)


def render() -> str:
    """The table, in Markdown: mean, sample standard deviation and number of seeds."""
    scores: dict[tuple[Any, ...], list[float]] = {}
    for text in RECORD.read_text(encoding="utf-8").splitlines():
        line = json.loads(text)
        method = (line["clip"], line["group"], line["features"])
        scores.setdefault((*method, line["bits"], line["activation_bits"]), []).append(line["metrics"]["eval_f1"])
    lines = [
        "| F1 | 4 / 4 | 3 / 3 | weights 2, activations 8 |",
        "|---|---:|---:|---:|",
        f"| FP32 | {_cell(scores[None, None, False, None, None])} | | |",
    ]
    for name, *method in ROWS:
        lines.append(f"| {' | '.join([name, *(_cell(scores.get((*method, *width), [])) for width in WIDTHS)])} |")
    return "\n".join([*lines, ""])


def _cell(values: list[float]) -> str:
    if len(values) < 2:
        return "".join(f"{value:.2f} (1 seed)" for value in values)
    return f"{statistics.fmean(values):.2f} ± {statistics.stdev(values):.2f} ({len(values)} seeds)"


TABLE = TableInPage(ROOT / "docs/guides/four_bits.md", "table of presets", render)

if __name__ == "__main__":
    TABLE.write()
