"""The table of training steps on a GPU in the documentation, from the record of ``benchmarks/gpu.py``.

``python -m tests.docs.gpu_table`` writes it into the page; a test compares the two.
"""

from __future__ import annotations

import json

from .table_in_page import ROOT, TableInPage

RECORD = ROOT / "benchmarks/results/gpu.json"
VARIANTS = ("float sdpa", "float eager", "paper", "accurate")
BASE = "float eager"
FORMS = {
    "MiniLM, eager": ("minilm_eager", "MiniLM {}"),
    '`torch.compile`, `"default"`': ("minilm_compiled", "MiniLM {}, default"),
    '`"reduce-overhead"`': ("minilm_compiled", "MiniLM {}, reduce-overhead"),
    "BERT-Base, eager": ("bert_base_eager", "BERT-Base {}"),
}


def render() -> str:
    """The table, in Markdown."""
    parts = json.loads(RECORD.read_text(encoding="utf-8"))["parts"]
    times = {part: {row["name"]: row["ms"] for row in found["rows"] if "ms" in row} for part, found in parts.items()}
    lines = [f"| | {' | '.join(FORMS)} |", f"|---|{'---:|' * len(FORMS)}"]
    for variant in VARIANTS:
        cells = []
        for part, name in FORMS.values():
            taken, base = times[part][name.format(variant)], times[part][name.format(BASE)]
            cells.append(f"{taken:.1f} ({taken / base:.2f})")
        lines.append(f"| {variant} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


TABLE = TableInPage(ROOT / "docs/benchmarks.md", "table of steps on a GPU", render)

if __name__ == "__main__":
    TABLE.write()
