"""Pictures of a report's page for the docs: ``python -m tests.analysis.screenshots [report.json]``."""

import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from octav_hf import Report
from octav_hf.analysis.page.render import render
from tests.analysis.example_report import example_report
from tests.conftest import CHROMIUM

if TYPE_CHECKING:
    from playwright.sync_api import Browser

FOLDER = Path(__file__).parent.parent.parent / "docs" / "_static"
VIEWS: dict[str, tuple[int, int, Any, str]] = {
    "light": (1000, 1200, "light", "nav"),
    "dark": (1000, 1200, "dark", "nav"),
    "phone": (375, 812, "light", "body"),
}
"""Name of a picture -> width and height of the window in pixels, the system's colours, and what is at the top."""


def take(browser: "Browser", page: Path, folder: Path) -> None:
    """Write ``report-<view>.png`` of a page into an existing folder."""
    for name, (width, height, scheme, top) in VIEWS.items():
        opened = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
        opened.goto(page.as_uri())
        opened.locator(top).evaluate("top => top.scrollIntoView({ behavior: 'instant' })")
        opened.screenshot(path=folder / f"report-{name}.png")
        opened.close()


def main(arguments: list[str]) -> None:
    """Write the pictures of a report that ``octav-hf report`` has written, or of the example, into ``docs/_static``."""
    from playwright.sync_api import sync_playwright

    report = Report.load(arguments[0]) if arguments else example_report()
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        page = Path(folder, "report.html")
        page.write_text(render(report), encoding="utf-8")
        browser = playwright.chromium.launch(executable_path=CHROMIUM, chromium_sandbox=False, args=["--disable-gpu"])
        take(browser, page, FOLDER)
        browser.close()


if __name__ == "__main__":
    main(sys.argv[1:])
