"""The page of a report in Chromium: what it shows, what its controls do, and who can use it."""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Locator, Page

from octav_hf.analysis.page.render import render
from octav_hf.analysis.report_data import Report
from tests.analysis.example_report import example_report
from tests.analysis.screenshots import VIEWS, take

pytestmark = pytest.mark.needs_browser

CHARTS = ["chart-errors", "chart-sensitivity", "chart-bytes"]
SCHEMES = ["light", "dark"]


@pytest.fixture(scope="module")
def report() -> Report:
    return example_report(layers=3)


@pytest.fixture(scope="module")
def file(report: Report, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(render(report), encoding="utf-8")
    return path


@pytest.fixture
def open_page(browser: Browser, file: Path) -> Iterator[Callable[..., Page]]:
    """A function that opens a page; afterwards no script has failed, and nothing else has been asked for."""
    contexts, problems, requests = [], [], []

    def opened(path: Path = file, width: int = 1200, **options: Any) -> Page:
        context = browser.new_context(viewport={"width": width, "height": 900}, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(path.as_uri())
        return page

    yield opened
    for context in contexts:
        context.close()
    assert problems == []
    assert {url for url in requests if not url.startswith("file:")} == set()
    assert len(requests) == len(contexts)


def shown(rows: Locator) -> list[Any]:
    """The data of the rows that are to be seen."""
    return rows.evaluate_all("rows => rows.filter((row) => !row.hidden).map((row) => ({ ...row.dataset }))")


def modules(page: Page, chart: str) -> list[str]:
    return [row["module"] for row in shown(page.locator(f"#{chart} .row"))]


def test_bars_are_as_long_as_the_errors(open_page: Callable[..., Page], report: Report) -> None:
    page = open_page()
    errors = {row.module: 10 ** (-row.sqnr_db / 20) for row in report.outputs}
    lengths = page.locator("#chart-errors .row").evaluate_all(
        "rows => rows.filter((row) => !row.hidden).map((row) => [row.dataset.module, "
        "row.querySelector('.bar').getBoundingClientRect().width / row.querySelector('.track').clientWidth])"
    )
    assert len(lengths) == 20
    end = lengths[0][1] / errors[lengths[0][0]]
    for module, length in lengths:
        assert length == pytest.approx(errors[module] * end, abs=0.002)
    worst = sorted(errors, key=lambda module: -errors[module])
    assert [module for module, _ in lengths] == worst[:20]
    assert 1 / end == pytest.approx(0.8, abs=0.002)  # where the axis ends, for an error of 0.79
    assert page.locator("#chart-errors .ticks").inner_text().split("\n") == ["0 %", "20 %", "40 %", "60 %", "80 %"]


def test_kinds_of_operand_by_name_largest_first_whatever_is_filtered(
    open_page: Callable[..., Page], report: Report
) -> None:
    page = open_page()
    chart = page.locator("#chart-kinds")
    names = [
        "Outputs of GELU (inputs of output.dense)",
        "Inputs of attention.self.query, key and value",
        "Probabilities of attention.self",
    ]
    texts = [(f"{row.alone:.3g}", f"{row.all_but:.3g}") for row in report.kinds]
    for filter_ in ("", "layer.2"):
        page.locator("#filter-module").fill(filter_)
        page.locator("#order").select_option("smallest")
        assert modules(page, "chart-kinds")[:3] == names
        assert len(modules(page, "chart-kinds")) == 8
    chart.get_by_role("button", name="Show all 14").click()
    shown_texts = chart.locator(".value").evaluate_all("values => values.map((value) => value.lastChild.textContent)")
    assert shown_texts == [text for pair in texts for text in pair]
    lengths = chart.locator(".bar").evaluate_all("bars => bars.map((bar) => bar.getBoundingClientRect().width)")
    alone, all_but = lengths[::2], lengths[1::2]
    assert [length / alone[0] for length in alone] == pytest.approx([0.5**number for number in range(14)], abs=0.01)
    assert [length / all_but[0] for length in all_but[:4]] == pytest.approx([1, 0, 0.25, 0], abs=0.01)
    assert chart.locator(".worst .name").all_inner_texts() == names


@pytest.mark.parametrize("width", [375, 1200])
def test_figures_that_are_all_0_have_an_axis_and_no_bars(
    open_page: Callable[..., Page], report: Report, tmp_path: Path, width: int
) -> None:
    kinds = [replace(each, alone=0.0, all_but=-0.1) for each in report.kinds]
    path = tmp_path / "report.html"
    path.write_text(render(replace(report, kinds=kinds, suggestions=[], divergence=0.0)), encoding="utf-8")
    page = open_page(path, width=width)
    chart = page.locator("#chart-kinds")
    for ticks in chart.locator(".ticks").all():
        assert ticks.inner_text().split() == ["0", "1"]
        outer, first = (each.bounding_box() for each in (ticks, ticks.locator("span").first))
        assert first["x"] == pytest.approx(outer["x"], abs=1)
    tracks = chart.locator(".track").evaluate_all("all => all.map((each) => getComputedStyle(each).backgroundImage)")
    assert len(set(tracks)) == 1
    assert "calc(100% - 1px)" in tracks[0]  # from one tick to the next; divided by 0 they would fill the track
    assert {box["width"] for box in map(Locator.bounding_box, chart.locator(".bar").all()) if box} == {0}
    assert "on these batches the outputs are those of the float model" in page.locator("main").inner_text()


def test_names_may_be_broken_and_numbers_may_not(open_page: Callable[..., Page]) -> None:
    text = open_page().locator(".verdict").inner_html()
    assert "the outputs of GELU (inputs of output.<wbr>dense)" in text
    assert ": by 0.16, 0.08 and 0.04 when quantized alone, and by 0.21 when all operands" in text


def test_filters(open_page: Callable[..., Page]) -> None:
    page = open_page()
    page.locator("#filter-module").fill(" LAYER.2. ")
    for chart in CHARTS:
        names = modules(page, chart)
        assert names
        assert all(".layer.2." in name for name in names)
    assert (
        page.locator("#count").inner_text() == "16 of 48 operands"
    )  # six layers with two each, and attention with four

    page.locator("#filter-kind").select_option("attention")
    assert modules(page, "chart-errors") == ["bert.encoder.layer.2.attention.self"]
    page.locator("#filter-operand").select_option("probabilities")
    (row,) = shown(page.locator("#table tbody tr"))
    assert (row["module"], row["operand"]) == ("bert.encoder.layer.2.attention.self", "probabilities")

    page.locator("#filter-module").fill("no such")
    assert modules(page, "chart-errors") == []
    assert page.locator("#chart-errors").inner_text() == "No module matches the filter."


def test_order(open_page: Callable[..., Page], report: Report) -> None:
    page = open_page()
    page.locator("#chart-errors .more").click()
    order = page.locator("#order")
    names = [row.module for row in report.outputs]
    by_error = sorted(names, key={row.module: row.sqnr_db for row in report.outputs}.__getitem__)
    for option, expected in {
        "largest first": by_error,
        "smallest first": by_error[::-1],
        "as in the model": names,
        "by name": sorted(names),  # no number has two digits
    }.items():
        order.select_option(option)
        assert modules(page, "chart-errors") == expected
    page.locator("#chart-errors .more").click()
    assert modules(page, "chart-errors") == sorted(names)[:20]


def test_table_is_sorted_by_numbers(open_page: Callable[..., Page], report: Report) -> None:
    page = open_page()
    directions = []
    for column, field in {"SQNR": "sqnr_db", "To zero": "zero_share", "Clip": "clip"}.items():
        found = {(row.module, row.operand): getattr(row, field) for row in report.statistics}
        button = page.get_by_role("button", name=column, exact=True)
        for _ in range(2):
            button.click()
            rows = [found[row["module"], row["operand"]] for row in shown(page.locator("#table tbody tr"))]
            (header,) = page.locator("#table [aria-sort]").all()
            assert header.inner_text() == column
            directions.append(header.get_attribute("aria-sort"))
            assert rows == sorted(rows, reverse=directions[-1] == "descending")
    assert directions == ["descending", "ascending", "ascending", "descending", "ascending", "descending"]


def test_what_was_not_measured_comes_last(open_page: Callable[..., Page], report: Report, tmp_path: Path) -> None:
    first, exact, *others = report.statistics
    nothing = replace(first, sqnr_db=None, clipped_share=None, zero_share=None, clip=None, histogram=None)
    path = tmp_path / "report.html"
    path.write_text(render(replace(report, statistics=[nothing, replace(exact, sqnr_db=math.inf), *others])), "utf-8")
    page = open_page(path)
    button = page.get_by_role("button", name="SQNR")
    for last in (["exact", "–"], ["–"]):  # lowest first, as it is opened; highest first
        texts = page.locator("#table tbody tr td:nth-child(4)").all_inner_texts()
        assert texts[-len(last) :] == last
        button.click()
    assert "Not measured: no batch reached them. bert.pooler.dense weight" in page.locator("main").inner_text()


def test_histogram_has_bars_levels_and_clip(open_page: Callable[..., Page], report: Report) -> None:
    page = open_page()
    worst, *_ = sorted(report.statistics, key=lambda row: row.sqnr_db)
    choice = page.locator("#choice")
    assert choice.locator("option:checked").inner_text() == f"{worst.module} · {worst.operand}"
    assert page.locator("#drawing .bin").count() == sum(count > 0 for count in worst.histogram.counts)
    tall = page.locator("#drawing .bin").evaluate_all("bins => bins.map((bin) => bin.getBoundingClientRect().height)")
    assert min(tall) > 5  # one value is to be seen too

    row = next(row for row in report.statistics if row.operand == "query")
    choice.select_option(f"{row.module} · query")
    drawn = {
        kind: page.locator(f"#drawing .{kind}").evaluate_all("lines => lines.map((line) => line.x1.baseVal.value)")
        for kind in ("level", "clip")
    }
    assert len(drawn["level"]) == 16
    low, high = drawn["clip"]  # at -clip and clip, so a step is 1/16 of what lies between
    expected = [low + (high - low) * number / 16 for number in range(16)]
    assert drawn["level"] == pytest.approx(expected, abs=0.05)
    assert page.locator(".marks").inner_text() == f"clip {row.clip:.3g}"
    assert f"SQNR {row.sqnr_db:.1f} dB" in page.locator("#caption").inner_text()
    assert page.locator("#drawing").get_attribute("aria-labelledby") == "caption"


def test_an_operand_of_the_table_shows_its_histogram(open_page: Callable[..., Page]) -> None:
    page = open_page()
    row = page.locator("#table tbody tr[data-module$='layer.1.attention.self'][data-operand=value]")
    row.get_by_role("button").click()
    choice = page.locator("#choice")
    assert choice.locator("option:checked").inner_text() == "bert.encoder.layer.1.attention.self · value"
    assert choice.evaluate("choice => choice === document.activeElement")


def test_code_is_copied(open_page: Callable[..., Page], report: Report) -> None:
    page = open_page(permissions=["clipboard-read", "clipboard-write"])
    button = page.get_by_role("button", name="Copy the code of suggestion 2")
    button.click()
    page.get_by_text("Copied").wait_for()
    assert page.evaluate("navigator.clipboard.readText()") == report.suggestions[1].code


def test_code_is_selected_where_it_cannot_be_copied(open_page: Callable[..., Page], report: Report) -> None:
    page = open_page()
    page.evaluate("() => { navigator.clipboard.writeText = () => Promise.reject(new Error()); }")
    page.get_by_role("button", name="Copy the code of suggestion 1").click()
    page.get_by_text("Selected").wait_for()
    assert page.evaluate("getSelection().toString()").strip() == report.suggestions[0].code


def test_keyboard_reaches_and_works_every_control(open_page: Callable[..., Page]) -> None:
    page = open_page()
    page.evaluate(
        """() => {
            const controls = [...document.querySelectorAll("a, button, input, select, [tabindex]")];
            window.unreached = new Set(controls.filter((control) => control.checkVisibility()));
            document.addEventListener("focusin", (event) => window.unreached.delete(event.target));
        }"""
    )
    number = page.evaluate("window.unreached.size")
    assert number > 60
    for _ in range(number):
        page.keyboard.press("Tab")
    assert page.evaluate("[...window.unreached].map((control) => control.outerHTML)") == []

    page.get_by_role("button", name="To zero").focus()
    page.keyboard.press("Enter")
    assert page.locator("#table [aria-sort]").inner_text().strip() == "To zero"
    page.locator("#theme").focus()
    page.keyboard.press("Space")
    assert page.locator("#theme").get_attribute("aria-pressed") == "true"
    page.locator("#chart-errors .more").focus()
    page.keyboard.press("Enter")
    assert len(modules(page, "chart-errors")) == 21


@pytest.mark.parametrize("scheme", SCHEMES)
def test_theme_follows_the_system_until_it_is_switched(open_page: Callable[..., Page], scheme: str) -> None:
    page = open_page(color_scheme=scheme)
    colors = {scheme: background(page)}
    page.get_by_role("button", name="Dark mode").click()
    (other,) = {*SCHEMES} - {scheme}
    colors[other] = background(page)
    assert colors["light"] == "rgb(255, 255, 255)"
    assert colors["dark"] == "rgb(21, 24, 28)"


def background(page: Page) -> str:
    return page.evaluate("getComputedStyle(document.body).backgroundColor")


@pytest.mark.parametrize(("scheme", "width"), [("light", 375), ("dark", 1200)])
def test_accessible(open_page: Callable[..., Page], scheme: str, width: int) -> None:
    """Contrast, names, roles and order of headings, as axe-core checks them; no sideways scrolling."""
    page = open_page(width=width, color_scheme=scheme, bypass_csp=True)  # the check is a script of another file
    found = Axe().run(page)
    assert found.violations_count == 0, found.generate_report()
    assert page.evaluate("document.documentElement.scrollWidth") == width


def test_long_names_fit(open_page: Callable[..., Page], tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text(render(example_report(layers=1, rename="a" * 80 + ".layer")), encoding="utf-8")
    page = open_page(path)
    for width in (320, 768):
        page.set_viewport_size({"width": width, "height": 900})
        assert page.evaluate("document.documentElement.scrollWidth") == width


def test_text_of_others_is_text(open_page: Callable[..., Page], tmp_path: Path) -> None:
    attack = "<script>document.title = 'changed'</script><img src=x onerror=alert(1)>\"'&{{ 7 * 7 }}"
    made = example_report(layers=1, rename=attack)
    operand, *others = made.operands
    suggestion = replace(made.suggestions[0], title=attack, reason=attack, cost=attack, code=attack)
    made = replace(made, model=attack, operands=[replace(operand, reason=attack), *others], suggestions=[suggestion])
    path = tmp_path / "report.html"
    path.write_text(render(made), encoding="utf-8")
    page = open_page(path)
    assert page.title() == f"Quantization report: {attack}"
    assert page.locator("script").count() == 2
    assert page.locator("img").count() == 0
    assert page.locator("h1").inner_text() == attack
    assert page.locator("pre code").inner_text() == attack
    assert page.locator("#chart-errors .name").first.inner_text().startswith(attack)
    assert page.locator("#choice option").first.inner_text().startswith(attack)
    assert page.locator(".reasons dt").inner_text() == attack


def test_without_script_everything_but_the_histogram_is_there(open_page: Callable[..., Page], report: Report) -> None:
    page = open_page(java_script_enabled=False)
    assert page.locator("#chart-errors .row").count() == len(report.outputs)
    assert page.locator("#table tbody tr").count() == len(report.statistics)


def test_screenshots(browser: Browser, file: Path, tmp_path: Path) -> None:
    take(browser, file, tmp_path)
    for name, (width, *_) in VIEWS.items():
        picture = tmp_path / f"report-{name}.png"
        assert picture.stat().st_size < 250_000
        assert int.from_bytes(picture.read_bytes()[16:20], "big") == width


def test_the_data_of_the_histograms_is_json(file: Path, report: Report) -> None:
    text = file.read_text(encoding="utf-8")
    data = json.loads(text.partition('id="data">')[2].partition("</script>")[0])
    assert [row["operand"] for row in data[:2]] == ["probabilities", "probabilities"]
    assert sum(sum(row["counts"]) + sum(row["tails"]) for row in data) == sum(row.elements for row in report.statistics)
