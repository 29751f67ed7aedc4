"""Style and deterministic saving of all plots."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

STYLE = {"font.size": 9, "svg.hashsalt": "octav_hf", "axes.spines.top": False, "axes.spines.right": False}
_DPI = 160


def save(figure: Figure, path: Path) -> None:
    """Write a figure to `path` with the suffixes `.png` and `.svg`, and close it."""
    figure.savefig(path.with_suffix(".png"), dpi=_DPI, metadata={"Software": None})
    figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
    plt.close(figure)
