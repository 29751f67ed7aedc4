"""The code blocks of Markdown pages."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

FENCE = re.compile(r"^```(\S*)$(.*?)^```$", re.MULTILINE | re.DOTALL)
NOT_RUN = re.compile(r"<!-- not run: (.+) -->\s*\Z")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its code, and why it is not run, if it is not."""

    language: str
    code: str
    line: int
    not_run: str | None


def blocks_of(page: Path) -> Iterator[Block]:
    """Python and shell blocks in their order; ``ValueError`` for a language that no test runs."""
    text = page.read_text(encoding="utf-8")
    for found in FENCE.finditer(text):
        language, code = found.groups()
        line = text[: found.start()].count("\n") + 1
        if language.startswith("{"):  # a directive of Sphinx
            continue
        if language not in ("python", "sh"):
            raise ValueError(f"{page}, line {line}: a block in {language or 'no language'}, which no test runs")
        reason = NOT_RUN.search(text[: found.start()])
        yield Block(language, code, line, reason and reason[1])
