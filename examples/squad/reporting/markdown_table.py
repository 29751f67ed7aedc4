"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def markdown_table(header: Sequence[str], texts: int, rows: Iterable[Sequence[str]]) -> str:
    """A table whose first `texts` columns are left-aligned and the others right-aligned."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * texts + "---:|" * (len(header) - texts)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])
