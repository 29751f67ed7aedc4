"""Pictures of a report's page for the docs: ``python -m tests.analysis.screenshots [report.json]``."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from playwright.sync_api import Browser

FOLDER = Path(__file__).parent.parent.parent / "docs" / "_static"
VIEWS: dict[str, tuple[int, int, Any]] = {
    "light": (1200, 1500, "light"),
    "dark": (1200, 1500, "dark"),
    "phone": (375, 812, "light"),
}
"""Name of a picture -> width and height in pixels of the window, and the colours that the system prefers."""


def take(browser: "Browser", page: Path, folder: Path) -> None:
    """Write ``report-<view>.png`` of a page into an existing folder."""
    for name, (width, height, scheme) in VIEWS.items():
        opened = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
        opened.goto(page.as_uri())
        opened.screenshot(path=folder / f"report-{name}.png")
        opened.close()
