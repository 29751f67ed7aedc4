"""The plots of a study, as PNG and SVG: F1 against bits and bytes, and the training loss (figure 4 of the paper)."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from reporting.plot_files import STYLE, save

from squad_study.cells import EXTRAS, Cell, cell_of
from squad_study.record import Line

COLOURS = {"octav": "#c1440e", "mse": "#7a3fb5", "max": "#7a7a7a", "mse_sweep": "#37618e", "percentile": "#3c8d5a"}
GROUP_COLOURS = {32: "#1b9e77", 64: "#2c7fb8", 128: "#253494"}
OTHER_COLOURS = ("#c06090", "#5b7f1e", "#6f6ad1")  # for users' own rules
EXTRA_MARKERS = "<>PX*dh"  # for combinations of extras
MARKERS = {99.9: "v", 99.99: "s", 99.999: "^"}
GRADIENT_COLOURS = {"ste": "#8f5aa8", "pwl": "#b08a2e", "mad": "#4aa5a5", "mph": COLOURS["octav"]}
FP32_COLOUR = "#1a1a1a"


def write_plots(lines: Sequence[Line], folder: Path) -> None:
    """Write `f1`, `convergence`, `recipes` if a cell has extras, and `bytes` if the sizes of checkpoints are known.

    The same lines give the same bytes.
    """
    with plt.rc_context(STYLE):
        save(plot_f1(lines), folder / "f1")
        recipes = [line for line in lines if is_recipe(cell_of(line))]
        if any(cell_of(line).extras for line in recipes):
            save(plot_f1(recipes), folder / "recipes")
        save(plot_convergence(lines), folder / "convergence")
        sized = [line for line in lines if "checkpoint_bytes" in line["metrics"]]
        if sized:
            save(plot_bytes(sized), folder / "bytes")


def is_recipe(cell: Cell) -> bool:
    """Whether the cell is FP32, dynamic max-scaling or OCTAV as in the paper, or has fine clips and shifted grids."""
    if cell.mode is None:
        return True
    as_in_the_paper = cell.clip in ("octav", "max") and not cell.extras
    return cell.mode == "dynamic" and cell.gradient == "mph" and (as_in_the_paper or (cell.fine and cell.shifted))


def plot_f1(lines: Sequence[Line]) -> Figure:
    """F1 against bits, mean over seeds with error bars of one sample standard deviation; FP32 as a horizontal line."""
    curves: dict[str, dict[int, list[float]]] = {}
    cells: dict[str, Cell] = {}
    fp32 = []
    for line in lines:
        cell, f1 = cell_of(line), line["metrics"]["eval_f1"]
        if cell.bits is None:
            fp32.append(f1)
        if cell.bits is None or cell.activation_bits is not None:
            continue
        curves.setdefault(cell.label, {}).setdefault(cell.bits, []).append(f1)
        cells.setdefault(cell.label, cell)
    figure, axes = plt.subplots(figsize=(7, 4.6), layout="constrained")
    if fp32:
        axes.axhline(statistics.fmean(fp32), color=FP32_COLOUR, linewidth=1, label="FP32")
        if len(fp32) > 1:
            low, high = (statistics.fmean(fp32) + sign * statistics.stdev(fp32) for sign in (-1, 1))
            axes.axhspan(low, high, color=FP32_COLOUR, alpha=0.12)
    # shifted sideways, so that markers and error bars do not overlap
    offsets = {label: 0.02 * (place - (len(curves) - 1) / 2) for place, label in enumerate(curves)}
    for label, curve in curves.items():
        widths = sorted(curve)
        axes.errorbar(
            [bits + offsets[label] for bits in widths],
            [statistics.fmean(curve[bits]) for bits in widths],
            [spread(curve[bits]) for bits in widths],
            capsize=2,
            markersize=5,
            linewidth=1.4,
            label=label,
            **look(cells[label]),
        )
    widths = sorted({bits for curve in curves.values() for bits in curve})
    axes.set(xlabel="bits of weights and activations", ylabel="F1 (%)")
    if widths:
        axes.set(xticks=widths, xlim=(widths[0] - 0.4, widths[-1] + 0.4))
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=7)
    return figure


def plot_bytes(lines: Sequence[Line]) -> Figure:
    """F1 against the megabytes of a checkpoint, packed if the model is quantized; mean and spread over seeds."""
    points: dict[tuple[str, float], list[float]] = {}
    cells: dict[str, Cell] = {}
    for line in lines:
        cell, metrics = cell_of(line), line["metrics"]
        points.setdefault((cell.label, metrics["checkpoint_bytes"] / 1e6), []).append(metrics["eval_f1"])
        cells.setdefault(cell.label, cell)
    figure, axes = plt.subplots(figsize=(7, 4.6), layout="constrained")
    for label, cell in cells.items():
        of_label = {size: f1 for (name, size), f1 in points.items() if name == label}
        means = [statistics.fmean(f1) for f1 in of_label.values()]
        spreads = [spread(f1) for f1 in of_label.values()]
        appearance = {"color": FP32_COLOUR, "marker": "*"} if cell.bits is None else look(cell)
        appearance["linestyle"] = "none"
        axes.errorbar(list(of_label), means, spreads, capsize=2, markersize=6, label=label, **appearance)
    axes.set(xlabel="checkpoint (MB)", ylabel="F1 (%)")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=7)
    return figure


def spread(values: Sequence[float]) -> float:
    """The sample standard deviation; NaN, which draws no error bar, for one value."""
    return statistics.stdev(values) if len(values) > 1 else math.nan


def look(cell: Cell) -> dict[str, str]:
    """Colour by clip, groups, or estimator if not MPH; line style by mode; marker by percentile and extras."""
    clip = str(cell.clip)
    colour = COLOURS.get(clip) or OTHER_COLOURS[sum(map(ord, clip)) % len(OTHER_COLOURS)]
    colour = GROUP_COLOURS[cell.group] if cell.group is not None else colour
    marker = MARKERS.get(cell.percentile or 0, "o")
    if cell.gradient != "mph":
        colour, marker = GRADIENT_COLOURS[str(cell.gradient)], "D"
    if cell.extras:
        marker = EXTRA_MARKERS[
            (sum(2**i for i, extra in enumerate(EXTRAS) if getattr(cell, extra)) - 1) % len(EXTRA_MARKERS)
        ]
    return {"color": colour, "linestyle": "-" if cell.mode == "dynamic" else "--", "marker": marker}


def plot_convergence(lines: Sequence[Line]) -> Figure:
    """Training loss against optimizer steps, mean over seeds, at the most common number of bits.

    The left panel shows clipping rules, the right one gradient estimators of dynamic OCTAV; FP32 is in both.
    """
    counts = Counter(line["bits"] for line in lines if line["bits"] is not None)
    bits = min(counts, key=lambda bits: (-counts[bits], bits), default=None)
    cells = [(cell_of(line), line["loss_curve"]) for line in lines if line["bits"] in (None, bits)]
    estimators = [(c, curve) for c, curve in cells if c.bits is None or (c.mode, c.clip) == ("dynamic", "octav")]
    rules = [(c, curve) for c, curve in cells if c.bits is None or c.gradient == "mph"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4.4), sharey=True, layout="constrained")
    title = "" if bits is None else f", {bits} bits"
    _draw_losses(left, rules, f"clips{title}", by_gradient=False)
    _draw_losses(right, estimators, f"gradients of dynamic OCTAV{title}", by_gradient=True)
    left.set(ylabel="training loss")
    return figure


def _draw_losses(axes: Axes, cells: Sequence[tuple[Cell, list[list[float]]]], title: str, by_gradient: bool) -> None:
    losses: dict[str, dict[float, list[float]]] = {}
    looks: dict[str, dict[str, str]] = {}
    for cell, curve in cells:
        label = cell.label if cell.bits is None or not by_gradient else str(cell.gradient).upper()
        for step, loss in curve:
            losses.setdefault(label, {}).setdefault(step, []).append(loss)
        if cell.bits is None:
            looks[label] = {"color": FP32_COLOUR, "linestyle": "-"}
        elif by_gradient:
            looks[label] = {"color": GRADIENT_COLOURS[str(cell.gradient)], "linestyle": "-"}
        else:
            looks[label] = look(cell)
    for label, curve in losses.items():
        steps = sorted(curve)
        means = [statistics.fmean(curve[step]) for step in steps]
        every = max(1, len(steps) // 4)
        axes.plot(steps, means, linewidth=1.3, markersize=4, markevery=every, label=label, **looks[label])
    axes.set(xlabel="optimizer steps", title=title)
    axes.grid(alpha=0.3)
    if losses:
        columns = 3 if max(map(len, losses)) <= 30 else 1
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=columns, frameon=False, fontsize=8)
