"""Every number in the example's README is in a checked-in record, and its tables follow from the records."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from compare_answers import table
from squad_study.cells import cell_of
from squad_study.record import Line, read_lines
from squad_study.tables import cells_table, losses_table, markdown_tables, scores_table

FOLDER = Path(__file__).resolve().parents[3] / "examples" / "squad"
RESULTS = FOLDER / "results"
README = (FOLDER / "README.md").read_text(encoding="utf-8")
# What is no statement: code, file names and links; names of versions and of items of the paper.
NO_STATEMENT = re.compile(
    r"```.*?```|`[^`]*`|\]\([^)]*\)|v[12]\.\d|version \d+|FP32|s_1"
    r"|(?:Table|Appendix|Eq\.|[Ff]igures?|section) [A-Z]?\.?\d+(?:\.\d+)?",
    re.DOTALL,
)
NUMBER = re.compile(r"(?<![\w.,-])\d+(?:,\d{3})*(?:\.\d+)?(?![\w]|\.\d)")


def numbers(node: Any) -> Iterator[float]:
    """All numbers in a JSON value, including those in strings."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from numbers(key)
            yield from numbers(value)
    elif isinstance(node, list):
        yield float(len(node))  # how many there are is a fact of the record too
        for value in node:
            yield from numbers(value)
    elif isinstance(node, str):
        yield from (float(text) for text in re.findall(r"\d+(?:\.\d+)?(?:e-\d+)?", node))
    elif isinstance(node, int | float) and not isinstance(node, bool):
        yield float(node)


def records() -> Iterator[Any]:
    for path in sorted(RESULTS.rglob("*.json")):
        yield json.loads(path.read_text(encoding="utf-8"))
    for path in sorted(RESULTS.rglob("*.jsonl")):
        yield read_lines(path)


@pytest.fixture(scope="module")
def recorded() -> list[float]:
    found = [number for record in records() for number in numbers(record)]
    # the tables that are drawn from the records: means, spreads and ratios
    for path in sorted(RESULTS.rglob("*.md")):
        found += [float(text.replace(",", "")) for text in NUMBER.findall(path.read_text(encoding="utf-8"))]
    return found


def test_every_number_is_recorded(recorded: list[float]) -> None:
    missing = []
    for text in NUMBER.findall(NO_STATEMENT.sub(" ", README)):
        decimals = len(text.partition(".")[2])
        value = float(text.replace(",", ""))
        if not any(math.isclose(round(number, decimals), value, abs_tol=1e-9) for number in recorded):
            missing.append(text)
    assert not missing, f"not in {RESULTS}: {', '.join(missing)}"


def test_a_number_that_is_not_recorded_is_found(recorded: list[float]) -> None:
    """The test above can fail: no record contains these."""
    for number in (61.77, 1345.0, 48.7):
        assert not any(math.isclose(round(each, 2), number, abs_tol=1e-9) for each in recorded)


def cells(name: str) -> list[Line]:
    """The cells of a record, in the order of the tables."""
    lines = [line for line in read_lines(RESULTS / name) if "clips" not in line]
    return sorted(lines, key=lambda line: cell_of(line).place)


def test_tables_are_those_of_the_records() -> None:
    assert cells_table(cells("demo/results.jsonl")) in README
    for name in ("real_squad/results.jsonl", "four_bits/long.jsonl"):
        assert scores_table(cells(name), "eval_f1") in README


def test_losses_at_four_bits_are_those_of_the_record() -> None:
    lines = cells("four_bits/results.jsonl")
    start = json.loads((RESULTS / "four_bits/float_model.json").read_text(encoding="utf-8"))["metrics"]["eval_f1"]
    assert losses_table(lines, start) in README
    assert (RESULTS / "four_bits/tables.md").read_text(encoding="utf-8") == markdown_tables(lines, start)
    assert f"--start_f1 {start}\n" in README


def test_the_table_of_answers_is_that_of_the_record() -> None:
    assert table(json.loads((RESULTS / "deploy/answers.json").read_text(encoding="utf-8"))["rows"]) in README
