"""The figures of the concept pages, drawn from the package's own functions.

``python docs/figures.py`` writes each one twice into ``docs/_static/figures``: for light and for dark pages.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from octav_hf.functional import (
    fake_quantize,
    integer_range,
    max_clip,
    mse_clip,
    octav_clip,
    quantization_error,
    round_to_grid,
    step_size,
)
from octav_hf.functional.groups import Groups

FOLDER = Path(__file__).parent / "_static" / "figures"
ORANGE, BLUE, GREEN = "#d9622b", "#4a86c5", "#4f9d69"
THEMES = {"light": "#222222", "dark": "#dddddd"}  # of text and axes; the background is transparent


def long_tailed(*shape: int) -> Tensor:
    """Values as in an activation: most of them small, a few large."""
    generator = torch.Generator().manual_seed(0)
    return torch.empty(*shape).exponential_(generator=generator) * torch.empty(*shape).bernoulli_(
        generator=generator
    ).mul_(2).sub_(1)


def quantizer() -> Figure:
    """The staircase of a signed and of an unsigned grid."""
    figure, panels = plt.subplots(1, 2, figsize=(8, 3.6), sharey=True, layout="constrained")
    bits, clip = 3, torch.tensor(1.0)
    x = torch.linspace(-1.6, 1.6, 4001)
    for axes, signed in zip(panels, (True, False), strict=True):
        low, high = integer_range(bits, signed)
        step = float(step_size(clip, bits, signed))
        for level in range(low, high + 1):
            axes.axhline(level * step, color="C7", linewidth=0.5, alpha=0.6)
        axes.plot(x, x, ":", color="C7", label="x")
        axes.plot(x, round_to_grid(x, clip, bits, signed=signed), color=BLUE, label="Q(x)")
        for edge in (-1, 1) if signed else (1,):
            axes.axvline(edge, color=ORANGE, linestyle="--", label="clip s" if edge == 1 else None)
        kind = "signed" if signed else "unsigned"
        axes.set(xlabel="x / s", title=f"{bits} bits, {kind}: integers {low} to {high}", ylim=(-1.25, 1.25))
    panels[0].set_ylabel("Q(x) / s")
    panels[0].legend(loc="lower right")
    return figure


def clipping() -> Figure:
    """The error of a tensor against its clip, and how Eq. 6 finds the lowest point."""
    figure, panels = plt.subplots(1, 2, figsize=(8, 3.6), layout="constrained")
    x = long_tailed(20_000)
    largest = float(max_clip(x, 4))
    power = x.square().mean() / largest**2  # in the units of quantization_error
    clips = torch.linspace(0.02, 1.1, 300) * largest
    for bits, colour in ((4, BLUE), (8, GREEN)):
        errors = [float(quantization_error(x, clip, bits) / power) for clip in clips]
        panels[0].plot(clips, errors, color=colour, label=f"{bits} bits")
        for rule, marker in ((octav_clip, "o"), (max_clip, "s")):
            clip = rule(x, bits)
            panels[0].plot(clip, quantization_error(x, clip, bits) / power, marker, color=colour)
    for marker, label in (("o", "clip of Eq. 6"), ("s", "largest magnitude")):
        panels[0].plot([], [], marker, color="C7", label=label)
    panels[0].set(yscale="log", xlabel="clip s", ylabel="error / mean square", title="Error of a long-tailed tensor")
    panels[0].legend()
    for bits, colour in ((2, ORANGE), (4, BLUE), (8, GREEN)):
        steps = range(15)
        panels[1].plot(
            steps,
            [float(octav_clip(x, bits, max_iterations=count)) for count in steps],
            ".-",
            color=colour,
            label=f"{bits} bits",
        )
        panels[1].axhline(float(octav_clip(x, bits)), color=colour, linestyle=":")
    panels[1].set(xlabel="updates of Eq. 6 from $s_1$", ylabel="clip s", title="Eq. 6, and its fixed point (dotted)")
    panels[1].legend()
    return figure


def grids() -> Figure:
    """The same values on grids with different clips."""
    x = long_tailed(20_000)
    figure, panels = plt.subplots(2, 1, figsize=(8, 4.4), sharex=True, layout="constrained")
    for axes, (rule, name) in zip(panels, ((max_clip, "largest magnitude"), (octav_clip, "Eq. 6")), strict=True):
        clip = rule(x, 4)
        _histogram(axes, x, clip, signed=True)
        decibels = _decibels(x, round_to_grid(x, clip, 4))
        axes.set(title=f"Clip by {name}: s = {float(clip):.2f}, SQNR {decibels:.1f} dB", ylabel="values")
    panels[-1].set_xlabel("x, with the 16 levels of a 4-bit grid")
    return figure


def asymmetric() -> Figure:
    """The output of a GELU on the signed grid, and on the unsigned grid that begins at its lowest value."""
    x = torch.nn.functional.gelu(torch.randn(20_000, generator=torch.Generator().manual_seed(0)))
    figure, panels = plt.subplots(2, 1, figsize=(8, 4.4), sharex=True, layout="constrained")
    _histogram(panels[0], x, mse_clip(x, 4), signed=True)
    panels[0].set(title="Signed grid: half of the levels go unused", ylabel="values")
    lowest = x.min()
    _histogram(panels[1], x, mse_clip(x - lowest, 4, signed=False), signed=False, offset=float(lowest))
    panels[1].set(title="Asymmetric grid: 16 levels from the lowest value on", ylabel="values", xlabel="output of GELU")
    return figure


def _decibels(x: Tensor, quantized: Tensor) -> float:
    """The signal-to-noise ratio."""
    return float(10 * torch.log10(x.square().mean() / (quantized - x).square().mean()))


def _histogram(axes: Axes, x: Tensor, clip: Tensor, *, signed: bool, offset: float = 0.0) -> None:
    low, high = integer_range(4, signed)
    step = float(step_size(clip, 4, signed))
    axes.hist(x.numpy(), bins=120, color=BLUE, log=True, histtype="stepfilled")
    for level in range(low, high + 1):
        axes.axvline(offset + level * step, color=ORANGE, linewidth=0.9)


def gradients() -> Figure:
    """The factor that each estimator gives the incoming gradient."""
    figure, panels = plt.subplots(1, 3, figsize=(8, 2.9), sharey=True, layout="constrained")
    for axes, (name, colour) in zip(panels, (("ste", GREEN), ("pwl", BLUE), ("mad", ORANGE)), strict=True):
        x = torch.linspace(-3, 3, 2001, requires_grad=True)
        fake_quantize(x, torch.tensor(1.0), 4, gradient=name).sum().backward()
        axes.plot(x.detach(), x.grad, color=colour)
        for edge in (-1, 1):
            axes.axvline(edge, color="C7", linestyle="--", linewidth=0.8)
        axes.set(title=name, xlabel="x / s", ylim=(-0.05, 1.15))
    panels[0].set_ylabel("gradient factor")
    return figure


def granularity() -> Figure:
    """What one clip is for, on a matrix whose tokens and channels differ in size, and the signal-to-noise ratio."""
    tokens, channels = 8, 32
    sizes = torch.linspace(0, 2.2, tokens).exp()[:, None] * torch.linspace(0, 1.6, channels).exp()
    x = torch.randn(tokens, channels, generator=torch.Generator().manual_seed(0)) * sizes
    groups = Groups(8, (1,))
    (cut,) = groups.cut(x)
    clips = {
        "tensor": mse_clip(x, 4).expand_as(x),
        "token": mse_clip(x, 4, dim=1).expand_as(x),
        "group of 8": mse_clip(cut, 4, dim=2).expand_as(cut).reshape_as(x),
    }
    largest = float(clips["tensor"].max().log2())
    figure, panels = plt.subplots(1, 3, figsize=(8, 2.7), sharey=True, layout="constrained")
    for axes, (name, clip) in zip(panels, clips.items(), strict=True):
        image = axes.imshow(clip.log2(), vmin=0, vmax=largest, cmap="viridis", aspect="auto")
        axes.set(title=f"per {name}\nSQNR {_decibels(x, round_to_grid(x, clip, 4)):.1f} dB", xlabel="channel")
    panels[0].set_ylabel("token")
    figure.colorbar(image, ax=panels, label="$\\log_2$ of the clip")
    return figure


FIGURES: dict[str, Callable[[], Figure]] = {
    function.__name__: function for function in (quantizer, grids, clipping, gradients, granularity, asymmetric)
}


def main(argv: list[str] | None = None) -> None:
    """Write the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--output_dir", type=Path, default=FOLDER)
    options = parser.parse_args(argv)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    for theme, colour in THEMES.items():
        names = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "axes.titlecolor")
        plt.rcParams.update(dict.fromkeys(names, colour))
        plt.rcParams.update(
            {
                "font.size": 9,
                "axes.titlesize": 10,
                "axes.spines.top": False,
                "axes.spines.right": False,
                "legend.frameon": False,
                "savefig.transparent": True,
                "svg.fonttype": "none",
                "svg.hashsalt": "octav_hf",
            }
        )
        for name, draw in FIGURES.items():
            figure = draw()
            figure.savefig(options.output_dir / f"{name}-{theme}.svg", metadata={"Date": None})
            plt.close(figure)


if __name__ == "__main__":
    main()
