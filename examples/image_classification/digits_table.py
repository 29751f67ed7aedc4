"""The results as a Markdown table with a row per model, as in the paper's Table 1."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

NAMES = {"fp32": "FP32", "max": "max", "ste": "OCTAV, STE", "pwl": "PWL", "mad": "MAD", "mph": "MPH"}


def markdown_table(rows: Sequence[dict[str, Any]]) -> str:
    """Mean accuracy and, with at least two seeds, the sample standard deviation over them.

    Args:
        rows: one per run: `model`, `method` and `accuracy` in percent.
    """
    models, methods = (list(dict.fromkeys(row[key] for row in rows)) for key in ("model", "method"))
    lines = [
        "| model | " + " | ".join(NAMES[method] for method in methods) + " |",
        "|---|" + "---:|" * len(methods),
    ]
    for model in models:
        cells = []
        for method in methods:
            scores = [row["accuracy"] for row in rows if (row["model"], row["method"]) == (model, method)]
            spread = f" ± {statistics.stdev(scores):.2f}" if len(scores) > 1 else ""
            cells.append(f"{statistics.mean(scores):.2f}{spread}" if scores else "")
        lines.append("| " + " | ".join([model, *cells]) + " |")
    return "\n".join(lines)
