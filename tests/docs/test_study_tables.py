"""Every row of figures in ``examples/squad/README.md`` follows from a record, except those of the part on groups."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterator

from .benchmark_tables import demo, record
from .table_in_page import ROOT

README = ROOT / "examples/squad/README.md"
RESULTS = ROOT / "examples/squad/results"
DESCRIPTIONS = ("# Extractive", "## The study")  # sections whose tables say what files and names are
GROUPS = "## Groups along"


def rows_of_records() -> Iterator[str]:
    """The rows of the tables that scripts wrote, and those made here."""
    for table in RESULTS.rglob("*.md"):
        yield from table.read_text(encoding="utf-8").splitlines()
    yield from demo().splitlines()
    yield from rows_of_the_paper()
    yield from rows_of_forms()
    yield from rows_before_and_after()


def row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def rows_of_the_paper() -> Iterator[str]:
    paper = record("examples/squad/results/paper_table5.json")
    yield row(f"{paper['model']} in the paper", *paper["bits"])
    for method, scores in paper["f1"].items():
        yield row(method, *(f"{score:.2f}" for score in scores))


def rows_of_forms() -> Iterator[str]:
    """F1 and EM of the simulated model, as integers and in ONNX Runtime, on all questions."""
    results = record("examples/squad/results/deploy/whole_dev_set.json")["results"]
    scores = {(each["run"], each["form"]): (each["f1"], each["exact_match"]) for each in results}
    for run in dict.fromkeys(each["run"] for each in results):
        forms = (scores.get((run, form)) for form in ("simulated", "integer", "onnxruntime"))
        yield row(run, *(f"{score:.2f}" if score else "" for pair in forms for score in pair or (None, None)))


def rows_before_and_after() -> Iterator[str]:
    """F1 of the cells that ran again, by seed."""
    f1 = {}
    for file in ("results", "rerun"):
        cells = (each for each in record(f"examples/squad/results/real_squad/{file}.jsonl") if "metrics" in each)
        f1 |= {(file, each["cell"]): each["metrics"]["eval_f1"] for each in cells}
    names = [f"dynamic-{method}-4bit-seed" for method in ("octav", "mse-fine-shifted")]
    columns = [[f1[file, f"{name}{seed}"] for seed in range(3)] for name in names for file in ("results", "rerun")]
    for seed, scores in enumerate(zip(*columns, strict=True)):
        yield row(seed, *(f"{score:.2f}" for score in scores))
    yield row("mean", *(f"{statistics.mean(each):.2f} ± {statistics.stdev(each):.2f}" for each in columns))


def rows_of_figures(page: str) -> Iterator[tuple[str, str]]:
    """Section and row."""
    section = ""
    for line in page.splitlines():
        section = line if line.startswith("#") else section
        if re.match(r"\|.*\d", line.replace("F1", "")) and not section.startswith((*DESCRIPTIONS, GROUPS)):
            yield section, line


def test_every_row_is_that_of_a_record() -> None:
    known = set(rows_of_records())
    found = list(rows_of_figures(README.read_text(encoding="utf-8")))
    assert len(found) > 60
    assert [each for each in found if each[1] not in known] == []


def test_a_row_without_a_record_is_found() -> None:
    """The test above can fail."""
    page = README.read_text(encoding="utf-8").replace("| w8a8 | 63.51 |", "| w8a8 | 63.52 |")
    known = set(rows_of_records())
    (changed,) = (line for _, line in rows_of_figures(page) if line not in known)
    assert changed.startswith("| w8a8 | 63.52 |")
