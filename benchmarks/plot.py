"""The plots of the documentation's benchmarks, from the JSON files that the benchmarks write.

python benchmarks/plot.py --clip clip.json --step step.json --inference inference.json --output_dir benchmarks/plots
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
import numpy as np

COLOURS = {"octav_clip": "#c1440e", "aminmax": "#37618e", "eq6": "#8a8a8a"}
LABELS = {"octav_clip": "octav_clip", "aminmax": "torch.aminmax", "eq6": "iterations of Eq. 6"}


def main(argv: list[str] | None = None) -> None:
    """Write `clip.svg`, `step.svg` and `inference.svg` for the files that are given."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    for name in PLOTS:
        parser.add_argument(f"--{name}", type=Path, help=f"file written by {name}.py --output")
    parser.add_argument("--output_dir", type=Path, required=True)
    options = parser.parse_args(argv)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    plt.rcParams.update(
        {"font.size": 10, "svg.hashsalt": "octav_hf", "axes.spines.top": False, "axes.spines.right": False}
    )
    for name, plot in PLOTS.items():
        if path := getattr(options, name):
            plot(json.loads(path.read_text()), options.output_dir / f"{name}.svg")


def plot_clip(rows: list[dict[str, Any]], path: Path) -> None:
    """Time against the number of elements, both on logarithmic axes."""
    gaussian = [row for row in rows if row["tensor"].startswith("Gaussian") and row["bits"] == 4]
    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for name, label in LABELS.items():
        sizes = [row["elements"] for row in gaussian]
        axes.plot(sizes, [1e3 * row[name] for row in gaussian], "o-", color=COLOURS[name], label=label)
    axes.set(
        xscale="log", yscale="log", xlabel="elements", ylabel="milliseconds", title="Clip of a Gaussian tensor, 4 bits"
    )
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, metadata={"Date": None})


def plot_step(result: dict[str, Any], path: Path) -> None:
    """Time of steps relative to the FP32 eager step, with the quantizers' share marked."""
    medians = {name: statistics.median(times) for name, times in result["times"].items()}
    baseline = medians["FP32 eager"]
    names = list(medians)[::-1]
    figure, axes = plt.subplots(figsize=(6, 0.5 * len(names) + 1), layout="constrained")
    quantizers = [sum(result["parts"].get(name, {}).values()) / baseline for name in names]
    rest = [medians[name] / baseline - share for name, share in zip(names, quantizers, strict=True)]
    axes.barh(names, rest, color="#37618e", label="everything else")
    axes.barh(names, quantizers, left=rest, color="#c1440e", label="clips, rounding and its gradient")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlim(0, 1.1 * max(medians.values()) / baseline)
    for index, name in enumerate(names):
        axes.text(medians[name] / baseline + 0.01, index, f"{medians[name] / baseline:.2f}", va="center")
    axes.set(
        xlabel="time of a step / FP32 eager", title="Fine-tuning step of MiniLM, batch {} × {}".format(*result["size"])
    )
    figure.legend(frameon=False, loc="outside lower center", ncols=2, fontsize=8)
    figure.savefig(path, metadata={"Date": None})


def plot_inference(result: dict[str, Any], path: Path) -> None:
    """Times relative to PyTorch FP32 with the most threads, with a panel per model and a marker per size."""
    models = list(dict.fromkeys(row["model"] for row in result["rows"]))
    most = max(case.split(", ")[1] for case in result["rows"][0]["seconds"])
    figure, panels = plt.subplots(1, len(models), figsize=(5 * len(models), 4), sharey=True, layout="constrained")
    for axes, model in zip(np.atleast_1d(panels), models, strict=True):
        rows = [row for row in result["rows"] if row["model"] == model][::-1]
        base = next(row["seconds"] for row in rows if row["form"].startswith("PyTorch FP32"))
        cases = [case for case in base if case.endswith(most)]
        for case, marker, colour in zip(cases, "os^", ("#c1440e", "#37618e", "#8a8a8a"), strict=False):
            ratios = [row["seconds"][case] / base[case] for row in rows]
            axes.plot(ratios, [row["form"] for row in rows], marker, color=colour, label=case.split(", ")[0])
        axes.axvline(1, color="black", linewidth=0.8)
        axes.grid(alpha=0.3)
        axes.set(xlim=(0, None), xlabel="time / PyTorch FP32", title=f"{model}, {most}")
    axes.legend(title="batch x tokens", frameon=False)
    figure.savefig(path, metadata={"Date": None})


PLOTS = {"clip": plot_clip, "step": plot_step, "inference": plot_inference}


if __name__ == "__main__":
    main()
