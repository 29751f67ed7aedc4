"""Rendering a report as HTML.

Charts are drawn here rather than by a charting library. A page for a BERT with twelve layers takes 0.5 MB; the script
of Plotly alone takes 4.8 MB, of Bokeh 1.3 MB (1.9 MB with tables and controls), of Vega 0.9 MB from a package of 33 MB.
They would do little here. Bars are rows of text with a length: names of 45 characters fit on a phone, the browser's
search finds them, a screen reader reads names and values, which it cannot in a canvas, and the colours are the page's,
light and dark. Only the histogram is a drawing. Jinja2 fills in the template and escapes text.
"""

import math
import re
from collections.abc import Iterable, Sequence
from importlib.resources import files

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from ...coverage.report import Operand
from ..kind_names import kind_names
from ..operand_statistics import OperandStatistics
from ..report_data import Report
from ..sensitivity import KindSensitivity, ModuleSensitivity
from .charts import Chart, chart
from .histograms import histograms
from .numbers import NOTHING, decibels, percent, relative_error, significant, size


def render(report: Report) -> str:
    """The page, which may be opened from a file. Text from the model and its config is escaped."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "breakable": _breakable,
        "decibels": decibels,
        "percent": percent,
        "significant": significant,
        "size": size,
    }
    kinds = {row.module: row.kind for row in report.operands}
    measured = {(row.module, row.operand): row for row in report.statistics}
    quantized = [row for row in report.operands if row.bits is not None]
    rows = [(row, measured.get((row.module, row.operand))) for row in quantized]
    return environment.from_string(_file("page.html")).render(
        report=report,
        style=Markup(_file("page.css")),
        script=Markup(_file("page.js")),
        settings=_settings(quantized),
        quantized=len(quantized),
        worst=min((row.sqnr_db for row in report.statistics if row.sqnr_db is not None), default=None),
        bytes=sum(layer.bytes for layer in report.layers),
        float32_bytes=sum(layer.float32_bytes for layer in report.layers),
        errors=_errors(report),
        kind_sensitivity=_kinds(report),
        sensitivity=_sensitivity(report, kinds),
        sizes=_sizes(report),
        missing={"suggestions": ""} | {each.what: each.reason for each in report.unmeasured},
        rows=sorted(rows, key=lambda row: _order(row[1])),
        histograms=histograms(report.statistics),
        in_float=_in_float(report.operands),
        kinds=sorted({row.kind for row in quantized}),
        operand_names=list(dict.fromkeys(row.operand for row in quantized)),
    )


def _order(row: OperandStatistics | None) -> tuple[bool, float]:
    """Sort key: the lowest SQNR first, and operands without one last."""
    sqnr = None if row is None else row.sqnr_db
    return sqnr is None, math.inf if sqnr is None else sqnr


def _file(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def _breakable(name: str) -> Markup:
    """Text in which names may be broken after a dot or underscore and before a capital letter, but numbers may not."""
    parts = re.split(r"(?<=[._])(?!\d)|(?<=[a-z])(?=[A-Z])", name)
    return Markup("<wbr>").join(parts)


def _errors(report: Report) -> Chart:
    lengths = [relative_error(row.sqnr_db) for row in report.outputs]
    texts = [
        NOTHING if row.sqnr_db is None else f"{percent(length)} · {decibels(row.sqnr_db)}"
        for length, row in zip(lengths, report.outputs, strict=True)
    ]
    names = [(row.module, row.kind) for row in report.outputs]
    return chart(names, [("error of the output, relative to its size", lengths, texts)], percent)


def _kinds(report: Report) -> Chart:
    names = kind_names(report.kinds, report.functions)
    return _alone_and_all_but([(name[0].upper() + name[1:], "") for name in names], report.kinds)


def _sensitivity(report: Report, kinds: dict[str, str]) -> Chart:
    return _alone_and_all_but(
        [(row.module, kinds.get(row.module, "")) for row in report.sensitivity], report.sensitivity
    )


def _alone_and_all_but(names: list[tuple[str, str]], rows: Sequence[KindSensitivity | ModuleSensitivity]) -> Chart:
    columns = []
    for title, field in (("quantized alone", "alone"), ("saved with it in float", "all_but")):
        values = [getattr(row, field) for row in rows]
        columns.append((title, [max(value, 0.0) for value in values], [significant(value) for value in values]))
    return chart(names, columns, significant)


def _sizes(report: Report) -> Chart:
    texts = [
        f"{size(layer.bytes)} · " + (f"{layer.bits} bits" if layer.bits is not None else "float")
        for layer in report.layers
    ]
    names = [(layer.module, layer.kind) for layer in report.layers]
    return chart(names, [("bytes", [float(layer.bytes) for layer in report.layers], texts)], lambda x: size(int(x)))


def _settings(quantized: Iterable[Operand]) -> dict[str, list[str]]:
    """How operands are quantized, with the number of them -> the names of these operands."""
    counts: dict[str, dict[str, int]] = {}
    for row in quantized:
        of_operand = counts.setdefault(row.operand, {})
        words = f"{row.bits} bits, {row.clip_cell}"
        of_operand[words] = of_operand.get(words, 0) + 1
    settings: dict[str, list[str]] = {}
    for operand, found in counts.items():
        for words, count in found.items():
            settings.setdefault(words, []).append(f"{operand} ({count})")
    return settings


def _in_float(operands: Iterable[Operand]) -> dict[str, list[str]]:
    reasons: dict[str, list[str]] = {}
    for row in operands:
        if row.bits is None:
            reasons.setdefault(row.reason, []).append(f"{row.module} {row.operand}")
    return reasons
