"""The tables of measurements in the documentation, rendered by the benchmarks' own functions from their records.

``python -m tests.docs.benchmark_tables`` writes them into the pages; a test compares the two.
"""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .table_in_page import ROOT, TableInPage

PAGE = ROOT / "docs/benchmarks.md"
BENCHMARKS, SQUAD = ROOT / "benchmarks", ROOT / "examples/squad"


def record(path: str) -> Any:
    """The content of a JSON file, or the lines of a JSON-lines file."""
    text = (ROOT / path).read_text(encoding="utf-8")
    return json.loads(text) if path.endswith(".json") else [json.loads(line) for line in text.splitlines()]


@contextmanager
def importable(folder: Path) -> Iterator[None]:
    """The scripts in a folder can be imported for a while."""
    before = list(sys.path)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path[:] = before


def of_benchmark(
    name: str, rows_of: Callable[[Any], Any] = lambda record: record, *, file: str = ""
) -> Callable[[], str]:
    """What the function ``table`` of a benchmark makes of that benchmark's record, or of the record ``file``."""

    def render() -> str:
        with importable(BENCHMARKS):
            table = runpy.run_path(str(BENCHMARKS / f"{name}.py"))["table"]
        return f"{table(rows_of(record(f'benchmarks/results/{file or name}.json')))}\n"

    return render


def demo() -> str:
    """What ``make demo`` prints for its record."""
    with importable(SQUAD):
        from squad_study.tables import cells_table
    return f"{cells_table(record('examples/squad/results/demo/results.jsonl'))}\n"


TABLES = (
    TableInPage(PAGE, "table of the demo", demo),
    TableInPage(PAGE, "table of inference", of_benchmark("inference", lambda record: record["rows"])),
    TableInPage(
        PAGE, "table of inference with AVX2", of_benchmark("inference", lambda r: r["rows"], file="inference_avx2")
    ),
    TableInPage(PAGE, "table of steps", of_benchmark("step")),
    TableInPage(PAGE, "table of libraries", of_benchmark("peers")),
    TableInPage(PAGE, "table of clips", of_benchmark("clip")),
    TableInPage(ROOT / "docs/reference/checkpoints.md", "table of sizes", of_benchmark("size")),
)

if __name__ == "__main__":
    for each in TABLES:
        each.write()
