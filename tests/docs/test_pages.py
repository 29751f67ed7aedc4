"""What the Markdown files say agrees with the records, the config and the figures, and their links lead somewhere."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

from . import benchmark_tables, config_table, gpu_table, presets_table, results_table
from .table_in_page import ROOT, TableInPage

ON_GITHUB = [*ROOT.glob("*.md"), *(ROOT / "examples").glob("*/README.md")]
LINK = re.compile(r"\]\(([^)\s]+)\)")
TEXT = re.compile(r"<text[^>]*>([^<]*)</text>")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)


def test_the_readme_fits_a_few_screens() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


@pytest.mark.parametrize(
    "table",
    [config_table.TABLE, gpu_table.TABLE, presets_table.TABLE, results_table.TABLE, *benchmark_tables.TABLES],
    ids=lambda table: table.name,
)
def test_a_table_is_that_of_its_source(table: TableInPage) -> None:
    assert table.parts()[1] == table.render(), f"run python -m {table.render.__module__}"


def test_what_is_said_of_a_gpu_is_in_its_record() -> None:
    compiled, eager = (f"{gpu_table.ratio(form, 'paper'):.1f}" for form in ('`"reduce-overhead"`', "MiniLM, eager"))
    readme, page = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/benchmarks.md"))
    assert f'{compiled} times as long as in float with `torch.compile(mode="reduce-overhead")`, {eager} times' in readme
    assert f"it takes {eager} times as long as in float" in page
    assert f"replays the step as CUDA graphs: {compiled} times" in page


def test_the_benchmark_measures_all_rows_of_the_readme() -> None:
    forms = runpy.run_path(str(ROOT / "benchmarks/inference_forms.py"))["FORMS"]
    assert {form for _, form, _ in results_table.ROWS} <= forms.keys()


def test_figures_are_those_of_the_script_and_are_shown(tmp_path: Path) -> None:
    """The committed ones have the words and numbers of new ones."""
    runpy.run_path(str(ROOT / "docs/figures.py"))["main"](["--output_dir", str(tmp_path)])
    committed = ROOT / "docs/_static/figures"
    drawn = {path.name for path in tmp_path.iterdir()}
    assert drawn == {path.name for path in committed.iterdir()}
    for name in drawn:
        words, before = (TEXT.findall((folder / name).read_text(encoding="utf-8")) for folder in (tmp_path, committed))
        assert words == before != [], f"{name}: run python docs/figures.py"
    pages = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs/concepts").glob("*.md"))
    assert {name for name in drawn if f"../_static/figures/{name})" in pages} == drawn


def anchor(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("document", ON_GITHUB, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_on_github_lead_somewhere(document: Path) -> None:
    for link in LINK.findall(document.read_text(encoding="utf-8")):
        if link.startswith("https://"):
            continue
        name, _, fragment = link.partition("#")
        target = document.parent / name if name else document
        assert target.exists(), link
        if fragment:
            assert fragment in map(anchor, HEADING.findall(target.read_text(encoding="utf-8"))), link
