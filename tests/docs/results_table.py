"""The README's table of results, from the records of ``benchmarks/inference.py`` and of the deployed SQuAD models.

``python -m tests.docs.results_table`` writes it into the README; a test compares the two.
"""

from __future__ import annotations

import json
from typing import Any

from .table_in_page import ROOT, TableInPage

CASE = "8x128, 2 threads"
FP32 = "PyTorch FP32, sdpa"
# First cell, form in the benchmark, run and arithmetic of the scores.
ROWS = (
    ("FP32, PyTorch", FP32, ("fp32", "simulated")),
    ("FP32, ONNX Runtime", "onnxruntime FP32", ("fp32", "onnxruntime")),
    ("8-bit weights and activations, simulated", "W8A8 simulated", ("w8a8", "simulated")),
    ("… as integers, `convert_octav`", "W8A8 integer", ("w8a8", "integer")),
    ("… as integers, ONNX Runtime", "W8A8 ONNX, onnxruntime", ("w8a8", "onnxruntime")),
    ("4-bit weights, 8-bit activations, simulated", "W4A8 simulated", ("w4a8", "simulated")),
    ("… as integers, `convert_octav`", "W4A8 integer", ("w4a8", "integer")),
    ("… as integers, ONNX Runtime", "W4A8 ONNX, onnxruntime", ("w4a8", "onnxruntime")),
    ("4-bit weights and activations, simulated", "W4A4 simulated", ("w4a4", "simulated")),
    ("… as integers, `convert_octav`", "W4A4 integer", ("w4a4", "integer")),
    ("… as integers, ONNX Runtime", "W4A4 ONNX, onnxruntime", ("w4a4", "onnxruntime")),
)


def render() -> str:
    """The table, in Markdown."""
    scores = json.loads((ROOT / "examples/squad/results/deploy/whole_dev_set.json").read_text(encoding="utf-8"))
    f1 = {(row["run"], row["form"]): row["f1"] for row in scores["results"]}
    measured = json.loads((ROOT / "benchmarks/results/inference.json").read_text(encoding="utf-8"))["rows"]
    forms = {(row["model"], row["form"]): row for row in measured}
    lines = [
        "| | F1 | MiniLM: file (MB) | time / FP32 | BERT-Base: file (MB) | time / FP32 |",
        "|---|---:|" + "---:|" * 4,
    ]
    for name, form, run in ROWS:
        cells = [cell for model in ("MiniLM", "BERT-Base") for cell in _measured(forms, model, form)]
        lines.append(f"| {' | '.join([name, f'{f1[run]:.2f}', *cells])} |")
    return "\n".join([*lines, ""])


def _measured(forms: dict[tuple[str, str], dict[str, Any]], model: str, form: str) -> tuple[str, str]:
    """Megabytes, and time over that of FP32; empty where it was not measured."""
    if (model, form) not in forms:
        return "", ""
    row, base = forms[model, form], forms[model, FP32]
    return f"{row['file_bytes'] / 1e6:.1f}", f"{row['seconds'][CASE] / base['seconds'][CASE]:.2f}"


TABLE = TableInPage(ROOT / "README.md", "table of results", render)

if __name__ == "__main__":
    TABLE.write()
