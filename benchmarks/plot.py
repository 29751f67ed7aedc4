"""The plots of the README's performance section, from the JSON files that the benchmarks write.

python benchmarks/plot.py --clip clip.json --step step.json --output_dir benchmarks/plots
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

COLOURS = {"octav_clip": "#c1440e", "aminmax": "#37618e", "eq6": "#8a8a8a"}
LABELS = {"octav_clip": "octav_clip", "aminmax": "torch.aminmax", "eq6": "Eq. 6 as it is written"}


def main(argv: list[str] | None = None) -> None:
    """Write `clip.svg` and `step.svg`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--clip", type=Path, required=True, help="what clip.py --output wrote")
    parser.add_argument("--step", type=Path, required=True, help="what step.py --output wrote")
    parser.add_argument("--output_dir", type=Path, required=True)
    options = parser.parse_args(argv)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    plt.rcParams.update(
        {"font.size": 10, "svg.hashsalt": "octav_hf", "axes.spines.top": False, "axes.spines.right": False}
    )
    plot_clip(json.loads(options.clip.read_text()), options.output_dir / "clip.svg")
    plot_step(json.loads(options.step.read_text()), options.output_dir / "step.svg")


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
    """Whole steps over the FP32 eager step, the quantizers' share set off."""
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


if __name__ == "__main__":
    main()
