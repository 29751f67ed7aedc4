"""Bar charts, as the template draws them: rows of a name, bars, and their values in words."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from .numbers import scale


@dataclass(frozen=True)
class Bar:
    """One bar: its length as a share of the axis, and what it says."""

    share: float
    text: str


@dataclass(frozen=True)
class Row:
    """The bars of one module, one for each column of the chart; rows are sorted by ``value``, largest first."""

    module: str
    kind: str
    order: int  # in the model
    value: float
    bars: list[Bar]


@dataclass(frozen=True)
class Column:
    """The axis of one column: ticks as shares of its length, with their labels."""

    title: str
    ticks: list[tuple[float, str]]


@dataclass(frozen=True)
class Chart:
    """Rows, largest first, under the axes of their columns."""

    columns: list[Column]
    rows: list[Row]


def chart(
    names: Iterable[tuple[str, str]],
    columns: Iterable[tuple[str, list[float], list[str]]],
    tick: Callable[[float], str],
) -> Chart:
    """A chart of modules with a bar in each column.

    Args:
        names: module and kind of each row, in the model's order.
        columns: title, lengths (finite, at least 0) and texts of the rows. The first one sorts.
        tick: the label of a length on an axis.
    """
    axes, bars = [], []
    for title, lengths, texts in columns:
        end, ticks = scale(max(lengths, default=0.0))
        axes.append(Column(title, [(value / end, tick(value)) for value in ticks]))
        bars.append([(length, Bar(length / end, text)) for length, text in zip(lengths, texts, strict=True)])
    rows = [
        Row(module, kind, order, of_row[0][0], [bar for _, bar in of_row])
        for order, ((module, kind), of_row) in enumerate(zip(names, zip(*bars, strict=True), strict=True))
    ]
    return Chart(axes, sorted(rows, key=lambda row: -row.value))
