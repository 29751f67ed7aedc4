"""A generated table in a Markdown file, between two comments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class TableInPage:
    """Where a table is, and the function that renders it, with a newline at its end."""

    page: Path
    name: str
    render: Callable[[], str]

    def parts(self) -> tuple[str, str, str]:
        """The page before the table, the table, and the page behind it."""
        begin, end = (f"<!-- {self.name}: {edge} -->\n" for edge in ("begin", "end"))
        text = self.page.read_text(encoding="utf-8")
        if text.count(begin) != 1 or text.count(end.strip()) != 1:
            raise ValueError(f"{self.page} must have one {begin.strip()} and one {end.strip()}")
        before, _, rest = text.partition(begin)
        table, _, after = rest.partition(end)
        return before + begin, table, end + after

    def write(self) -> None:
        """Replace the table by one that is rendered now."""
        before, _, after = self.parts()
        self.page.write_text(before + self.render() + after, encoding="utf-8")
