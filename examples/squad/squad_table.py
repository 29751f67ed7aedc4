"""The comparison as a Markdown table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_HEADER = ("method", "bits (weights/activations)", "F1", "EM", "train loss", "median step (s)", "step / FP32")


def markdown_table(rows: Sequence[dict[str, Any]]) -> str:
    """One line per run.

    Args:
        rows: `method`, `bits` (None for FP32), `eval_f1`, `eval_exact_match` or `eval_exact` (percent), `train_loss`,
            and, when at least three steps were timed, `train_step_seconds_median`. The last column is left empty
            without an FP32 row.
    """
    fp32 = next((row.get("train_step_seconds_median") for row in rows if row["method"] == "fp32"), None)
    lines = ["| " + " | ".join(_HEADER) + " |", "|---|---|" + "---:|" * (len(_HEADER) - 2)]
    for row in rows:
        seconds = row.get("train_step_seconds_median")
        exact = row["eval_exact_match"] if "eval_exact_match" in row else row["eval_exact"]
        cells = (
            row["method"],
            "32/32" if row["bits"] is None else f"{row['bits']}/{row['bits']}",
            f"{row['eval_f1']:.2f}",
            f"{exact:.2f}",
            f"{row['train_loss']:.3f}",
            "" if seconds is None else f"{seconds:.3f}",
            "" if seconds is None or fp32 is None else f"{seconds / fp32:.2f}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
