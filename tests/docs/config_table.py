"""The table of the config's fields in the documentation, generated from the fields.

``python -m tests.docs.config_table`` writes it into the page; a test compares the two.
"""

from __future__ import annotations

from dataclasses import MISSING, Field, fields
from enum import StrEnum
from typing import Any

from octav_hf import OctavConfig

from .table_in_page import ROOT, TableInPage


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


TABLE = TableInPage(ROOT / "docs/reference/config.md", "table of the config", render)

if __name__ == "__main__":
    TABLE.write()
