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


def milliseconds(form: str, variant: str) -> float:
    """The time of a step, from the record."""
    part, name = FORMS[form]
    rows = json.loads(RECORD.read_text(encoding="utf-8"))["parts"][part]["rows"]
    return next(row["ms"] for row in rows if row["name"] == name.format(variant))


def ratio(form: str, variant: str) -> float:
    """The time of a step over that of the float model with eager attention."""
    return milliseconds(form, variant) / milliseconds(form, BASE)


def render() -> str:
    """The table, in Markdown."""
    lines = [f"| | {' | '.join(FORMS)} |", f"|---|{'---:|' * len(FORMS)}"]
    for variant in VARIANTS:
        cells = [f"{milliseconds(form, variant):.1f} ({ratio(form, variant):.2f})" for form in FORMS]
        lines.append(f"| {variant} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


TABLE = TableInPage(ROOT / "docs/benchmarks.md", "table of steps on a GPU", render)

if __name__ == "__main__":
    TABLE.write()
