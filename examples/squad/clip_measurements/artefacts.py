"""Tables and plots of the measurements of clips."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from clip_measurements.plots import write_plots
from clip_measurements.report import markdown_report


def write_artefacts(record: dict[str, Any], output_dir: Path) -> str:
    """Write `clips.md` and the plots of the measurements, and return the text of `clips.md`."""
    report = markdown_report(record)
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / "clips.md").write_text(report, encoding="utf-8")
    write_plots(record, output_dir)
    return report
