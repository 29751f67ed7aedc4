"""The README's table of the config's fields, generated from the fields.

``python -m tests.config_table`` writes it into the README; a test compares the two.
"""

from __future__ import annotations

import sys
from dataclasses import MISSING, Field, fields
from enum import StrEnum
from pathlib import Path
from typing import Any

from octav_hf import OctavConfig

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- table of the config: begin -->\n", "<!-- table of the config: end -->"


def default_of(field: Field[Any]) -> str:
    """The default as Python code."""
    value = field.default if field.default_factory is MISSING else field.default_factory()
    if isinstance(value, str):
        return f'"{value.value if isinstance(value, StrEnum) else value}"'
    return repr(value)


def render() -> str:
    """The table, in Markdown."""
    rows = [
        f"| `{field.name}` | `{default_of(field)}` | {field.metadata['help']} |"
        for field in fields(OctavConfig)
        if field.init
    ]
    return "\n".join(["| field of `OctavConfig` | default | |", "|---|---|---|", *rows, ""])


def main() -> None:
    """Write the table into the README."""
    before, _, rest = README.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    README.write_text(before + BEGIN + render() + END + after, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
