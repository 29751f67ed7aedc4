"""The compatibility table of the documentation, from the results of the architecture tests.

``python -m tests.architectures.compatibility`` runs those tests, writes what passed to ``compatibility.json``
beside this file, and the table into its page. Nothing is written if a test fails.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from ..docs.table_in_page import ROOT, TableInPage
from .models import ARCHITECTURES
from .test_architectures import KINDS

HERE = Path(__file__).parent
RESULTS = HERE / "compatibility.json"

# Test -> heading of its column.
COLUMNS = {
    "test_trains": "Trainer",
    "test_saved_and_loaded": "reload",
    "test_packed": "packed",
    "test_frozen": "frozen",
    "test_integer": "integer",
    "test_removed": "remove",
    "test_eager_and_sdpa_agree": "eager = sdpa",
    "test_generates_with_a_cache": "generate",
}


class Recorder:
    """Pytest plugin that records which test passed for which architecture, and its recorded properties."""

    def __init__(self) -> None:
        self.rows: dict[str, dict[str, Any]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Record a test that passed; ids begin with an architecture's name."""
        test, _, case = report.nodeid.rpartition("::")[2].removesuffix("]").partition("[")
        name = max((name for name in ARCHITECTURES if case.startswith(name)), key=len, default=None)
        if name is None or report.when != "call" or not report.passed:
            return
        row = self.rows.setdefault(name, {"passed": {}})
        row["passed"].setdefault(test, []).append(case.removeprefix(name).removeprefix("-"))
        row |= dict(report.user_properties)


def run() -> dict[str, Any]:
    """Run the architecture tests and return what passed; a failure ends the program."""
    recorder = Recorder()
    code = pytest.main([str(HERE / "test_architectures.py"), "-q", "-p", "no:cacheprovider"], plugins=[recorder])
    if code != 0:
        sys.exit(f"the tests of the architectures did not pass (exit status {int(code)}), so no table was written")
    return {
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "architectures": {name: recorder.rows[name] for name in ARCHITECTURES if name in recorder.rows},
    }


def render(results: dict[str, Any]) -> str:
    """The table of the results, in Markdown."""
    header = [
        "architecture",
        "attention",
        "operands: linear",
        "convolution",
        "attention",
        "left in float",
        *COLUMNS.values(),
    ]
    lines = ["| " + " | ".join(header) + " |", "|---|---|---:|---:|---:|---|" + ":---:|" * len(COLUMNS)]
    for name, row in results["architectures"].items():
        cells = [
            name,
            ", ".join(row["passed"]["test_covered"]) if row["attention"] else "",
            *(str(row[kind] or "") for kind in KINDS),
            ", ".join(row["left in float"]),
            *("yes" if test in row["passed"] else "" for test in COLUMNS),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    note = f"With {versions}; an empty cell means that this does not apply or was not tested."
    return "\n".join([*lines, "", note, ""])


def recorded() -> str:
    """The table of the recorded results."""
    return render(json.loads(RESULTS.read_text(encoding="utf-8")))


TABLE = TableInPage(ROOT / "docs/compatibility.md", "compatibility table", recorded)


def main() -> None:
    """Run, record and render."""
    RESULTS.write_text(json.dumps(run(), indent=1) + "\n", encoding="utf-8")
    TABLE.write()


if __name__ == "__main__":
    main()
