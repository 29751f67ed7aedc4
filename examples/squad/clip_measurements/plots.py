"""The plots of the measurements, each as PNG and SVG; the same measurements give the same bytes."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from reporting.plot_files import STYLE, save

from clip_measurements.measurements import REFERENCE_POINTS
from clip_measurements.report import KINDS, Record, error_ratio

COLOURS = {"octav": "#c1440e", "sweep": "#37618e", "max": "#8a8a8a"}
LABELS = {"octav": "OCTAV", "sweep": "100-point sweep", "max": "max-scaling"}
START_COLOURS = {"0": "#c1440e", "max": "#8a8a8a", "3σ": "#37618e", "4σ": "#5b9279", "5σ": "#b58900"}
START_MARKERS = {"0": "o", "max": "s", "3σ": "^", "4σ": "v", "5σ": "D"}
KIND_MARKERS = {
    "weight": "o",
    "embedding": "P",
    "input": "o",
    "query": "^",
    "key": "v",
    "probabilities": "s",
    "value": "D",
}
# The start max|x| is left out of a panel if it is more than this many times the largest other clip.
_CUT_OFF = 1.5


def write_plots(record: Record, output_dir: Path) -> None:
    """Write `clip_per_layer`, `mse_per_layer`, `convergence` and `second_minimum` as `.png` and `.svg`."""
    plots: dict[str, Callable[[Record], Figure | None]] = {
        "clip_per_layer": plot_clips,
        "mse_per_layer": plot_errors,
        "convergence": plot_convergence,
        "second_minimum": plot_curves,
    }
    with plt.rc_context(STYLE | {"axes.titlesize": 9, "legend.fontsize": 8.5}):
        for name, plot in plots.items():
            figure = plot(record)
            if figure is not None:  # None if nothing of the kind was measured
                save(figure, output_dir / name)


def plot_clips(record: Record) -> Figure:
    """OCTAV's and the sweep's clip divided by max|x|, for every tensor in order of depth."""

    def draw(axes: Axes, x: int, tensor: Record) -> None:
        clips = tensor["clips"]
        if clips["max"] == 0:
            return
        values = {rule: clips[rule] / clips["max"] for rule in ("sweep", "octav")}
        axes.plot([x, x], list(values.values()), color="#c0c0c0", linewidth=0.8, zorder=1)
        for rule, value in values.items():
            _mark(axes, x, value, rule, tensor["kind"])

    figure, grid = _per_layer(record, draw, "clip / max|x|", ("octav", "sweep"))
    for axes in grid:
        low, high = axes.get_ylim()
        axes.set_ylim(low, min(high, 1.25))
    figure.suptitle("Clips per tensor (weights: mean over the rows)", fontsize=10)
    return figure


def plot_errors(record: Record) -> Figure:
    """MSE of OCTAV, the sweep and max-scaling, divided by the lowest of the reference sweep, in order of depth."""

    def draw(axes: Axes, x: int, tensor: Record) -> None:
        for rule in ("max", "sweep", "octav"):
            ratio = error_ratio(tensor, rule)
            if ratio is not None:
                _mark(axes, x, ratio, rule, tensor["kind"])

    figure, grid = _per_layer(record, draw, "MSE / lowest MSE", ("octav", "sweep", "max"))
    for axes in grid:
        axes.axhline(1, color="black", linewidth=0.6, zorder=0)
    figure.suptitle(f"Measured error per tensor, over that of the best of {REFERENCE_POINTS} clips", fontsize=10)
    return figure


def plot_convergence(record: Record) -> Figure | None:
    """s_n of Eq. 6 from the five starts."""
    rows = [entry["sequences"] for entry in record["measured"]]
    if not any(rows):
        return None
    figure, grid = _grid(rows)
    for axes, bits, chosen in _panels(record, grid, "sequences"):
        for start, sequence in chosen["sequences"].items():
            numbers = range(1, len(sequence) + 1)
            style = {"color": START_COLOURS[start], "marker": START_MARKERS[start], "markersize": 3.5}
            axes.plot(numbers, sequence, linewidth=1, label=f"s₁ = {start.replace('max', 'max|x|')}", **style)
        axes.set_xticks([1, 5, 10, 15, 20])
        _cut_off_start(axes, chosen["sequences"])
        axes.set_title(f"{bits} bits, {_place(chosen)}", fontsize=8)
    _label(grid, "n", "clip sₙ")
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.suptitle("Eq. 6 from the paper's five starts", fontsize=10)
    return figure


def plot_curves(record: Record) -> Figure | None:
    """Measured MSE against the clip, for the tensors whose sweep clip exceeds OCTAV's most."""
    rows = [entry["curves"] for entry in record["measured"]]
    if not any(rows):
        return None
    figure, grid = _grid(rows)
    for axes, bits, tensor in _panels(record, grid, "curves"):
        peak, points = tensor["clips"]["max"], len(tensor["curve"])
        axes.plot([peak * k / points for k in range(1, points + 1)], tensor["curve"], color="black", linewidth=1)
        second = tensor["second_minimum"]
        if second:
            axes.plot(second["clip"], second["mse"], "x", color="black", markersize=7, markeredgewidth=1.5)
        for rule, marker in (("max", "s"), ("sweep", "D"), ("octav", "o")):
            face = COLOURS[rule] if rule == "octav" else "white"
            style = {"color": COLOURS[rule], "markerfacecolor": face, "markersize": 6, "markeredgewidth": 1.5}
            axes.plot(tensor["clips"][rule], tensor["mse"][rule], marker, clip_on=False, zorder=3, **style)
        axes.set(yscale="log", xlim=(0, 1.02 * peak))
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: _scientific(value)))
        axes.yaxis.set_minor_locator(ticker.NullLocator())
        axes.set_title(f"{bits} bits, {_place(tensor)}", fontsize=8)
    _label(grid, "clip", "MSE")
    markers = {"octav": "o", "sweep": "D", "max": "s"}
    handles = [_handle(markers[rule], COLOURS[rule], LABELS[rule], rule == "octav") for rule in markers]
    handles.append(_handle("x", "black", "second minimum"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    figure.suptitle("Measured error against the clip, where the sweep's clip exceeds OCTAV's most", fontsize=10)
    return figure


def _cut_off_start(axes: Axes, sequences: dict[str, list[float]]) -> None:
    """If the start max|x| is far above all other clips, cut the axis off and write the value there."""
    first, *rest = sequences["max"]
    others = max(*rest, *(clip for start, sequence in sequences.items() if start != "max" for clip in sequence))
    top = first if first < _CUT_OFF * others else 1.2 * others
    axes.set_ylim(-0.04 * top, 1.04 * top)
    if top < first:
        style = {"va": "top", "fontsize": 8, "color": START_COLOURS["max"]}
        axes.annotate(f"from {first:.3g}", (2, 1), (5, -2), ("data", "axes fraction"), "offset points", **style)


def _per_layer(
    record: Record, draw: Callable[[Axes, int, Record], None], ylabel: str, rules: Sequence[str]
) -> tuple[Figure, list[Axes]]:
    """A row of panels per number of bits: weights and activations, in order of depth."""
    groups = [
        (name, kinds)
        for name, kinds in (("weights", ("weight", "embedding")), ("activations", tuple(KINDS)[2:]))
        if any(tensor["kind"] in kinds for tensor in record["measured"][0]["tensors"])
    ]
    rows = len(record["measured"])
    figure, grid = plt.subplots(
        rows, len(groups), figsize=(10, 2.3 * rows + 1), sharey="row", squeeze=False, layout="constrained"
    )
    present = set()
    for entry, line in zip(record["measured"], grid, strict=True):
        for axes, (name, kinds) in zip(line, groups, strict=True):
            tensors = [tensor for tensor in entry["tensors"] if tensor["kind"] in kinds]
            for x, tensor in enumerate(tensors):
                draw(axes, x, tensor)
                present.add(tensor["kind"])
            _mark_layers(axes, tensors)
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
            axes.yaxis.set_minor_locator(ticker.NullLocator())
            axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 3, 5)))
            axes.grid(axis="y", alpha=0.3)
            axes.set_title(f"{name}, {entry['bits']} bits")
        line[0].set_ylabel(ylabel)
    for axes in grid[-1]:
        axes.set_xlabel("layer")
    handles = [_handle("o", COLOURS[rule], LABELS[rule], filled=rule == "octav") for rule in rules]
    names: dict[str, list[str]] = {}  # marker -> kinds of tensors
    for kind in (kind for kind in KINDS if kind in present):
        names.setdefault(KIND_MARKERS[kind], []).append(KINDS[kind])
    handles += [_handle(marker, "black", ", ".join(of_marker)) for marker, of_marker in names.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 8), frameon=False)
    return figure, list(grid.flat)


def _mark(axes: Axes, x: int, y: float, rule: str, kind: str) -> None:
    colour = COLOURS[rule]
    face = colour if rule == "octav" else "white"
    size = 3.6 if rule == "octav" else 4.8
    axes.plot(x, y, KIND_MARKERS[kind], color=colour, markerfacecolor=face, markersize=size, markeredgewidth=1)


def _handle(marker: str, colour: str, label: str, filled: bool = False) -> Line2D:
    face = colour if filled else "white"
    return Line2D([], [], marker=marker, color=colour, markerfacecolor=face, linestyle="", markersize=5, label=label)


def _mark_layers(axes: Axes, tensors: Sequence[Record]) -> None:
    """Write the numbers of the layers below the axis, with a thin line between layers."""
    layers = [_layer(tensor["name"]) for tensor in tensors]
    borders = [0, *(i for i in range(1, len(layers)) if layers[i] != layers[i - 1]), len(layers)]
    for border in borders[1:-1]:
        axes.axvline(border - 0.5, color="#d8d8d8", linewidth=0.6, zorder=0)
    spans = list(pairwise(borders))
    axes.set_xticks([(begin + end - 1) / 2 for begin, end in spans], [layers[begin] for begin, _ in spans])
    axes.tick_params(axis="x", length=0)
    axes.set_xlim(-0.8, len(tensors) - 0.2)


def _layer(name: str) -> str:
    """The number of the layer in a tensor's name; outside of layers, as in the head, the first part of the name."""
    number = re.search(r"\.(\d+)\.", name)
    return number[1] if number else re.split(r"[._ ]", name)[0]


def _place(tensor: Record) -> str:
    """A tensor's name from the layer's number on, and its row."""
    name, row = tensor["name"], tensor["row"]
    number = re.search(r"\.(\d+)\.", name)
    place = f"layer {number[1]}, {name[number.end() :]}" if number else name
    return place if row is None else f"{place}, row {row}"


def _scientific(value: float) -> str:
    mantissa, exponent = f"{value:.0e}".split("e")
    return f"${mantissa}\\cdot10^{{{int(exponent)}}}$" if mantissa != "1" else f"$10^{{{int(exponent)}}}$"


def _grid(rows: Sequence[Sequence[Any]]) -> tuple[Figure, Any]:
    columns = max(len(row) for row in rows)
    return plt.subplots(
        len(rows), columns, figsize=(3.4 * max(columns, 2), 2.4 * len(rows) + 0.8), squeeze=False, layout="constrained"
    )


def _panels(record: Record, grid: Any, key: str) -> list[tuple[Axes, int, Record]]:
    """Axes, number of bits and content of each panel; axes without content are hidden."""
    panels = []
    for entry, line in zip(record["measured"], grid, strict=True):
        for axes in line[len(entry[key]) :]:
            axes.set_visible(False)
        panels += [(axes, entry["bits"], content) for axes, content in zip(line, entry[key], strict=False)]
    for axes, _, _ in panels:
        axes.grid(alpha=0.3)
    return panels


def _label(grid: Any, xlabel: str, ylabel: str) -> None:
    for axes in grid[-1]:
        axes.set_xlabel(xlabel)
    for line in grid:
        line[0].set_ylabel(ylabel)
