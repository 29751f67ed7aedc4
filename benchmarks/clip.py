"""Time of `octav_clip` and `mse_clip`, compared with reads of the same tensor and with plain iterations of Eq. 6.

    python benchmarks/clip.py                      # 10^4 to 10^8 elements, 4 and 8 bits, per tensor and per row
    python benchmarks/clip.py --output clip.json

Medians of interleaved rounds; `aminmax` is `torch.aminmax`, `amax` is `abs().amax()`, which allocates.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from octav_hf.functional import mse_clip, octav_clip
from octav_hf.functional.grid import noise_factor

SEED = 0


def softmax_probabilities(batch: int, heads: int, length: int) -> torch.Tensor:
    """Attention probabilities of random scores, `[batch, heads, length, length]`."""
    return torch.softmax(3 * torch.randn(batch, heads, length, length), dim=-1)


CASES: dict[str, tuple[Callable[[], torch.Tensor], bool, int | None]] = {
    "probabilities 8x12x384x384": (lambda: softmax_probabilities(8, 12, 384), False, None),
    "probabilities 8x12x384x384, bfloat16": (lambda: softmax_probabilities(8, 12, 384).bfloat16(), False, None),
    **{f"Gaussian 10^{k}": (lambda k=k: torch.randn(10**k), True, None) for k in range(4, 9)},
    "probabilities, rows": (lambda: softmax_probabilities(8, 12, 192), False, -1),
    "weight rows 384x384": (lambda: torch.randn(384, 384), True, 1),
    "weight rows 1536x384": (lambda: torch.randn(1536, 384), True, 1),
    "weight rows 384x1536": (lambda: torch.randn(384, 1536), True, 1),
    "rows 10^4 x 10^4": (lambda: torch.randn(10**4, 10**4), True, 1),
}


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    """Measure, print a table, and return its rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    options = parser.parse_args(argv)
    rows = []
    for name in options.cases:
        make, signed, dim = CASES[name]
        torch.manual_seed(SEED)
        x = make()
        for bits in (4, 8):
            figures = measure(x, bits, signed, dim, options.rounds)
            rows.append({"tensor": name, "elements": x.numel(), "bits": bits, **figures})
    print(f"{torch.get_num_threads()} threads, median of {options.rounds} rounds, milliseconds")
    print(table(rows))
    if options.output:
        options.output.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """In Markdown: milliseconds, and over those of PyTorch's reductions."""
    ratios = ("/ aminmax", "/ amax")
    columns = (
        "torch.aminmax",
        "abs().amax()",
        "octav_clip",
        *ratios,
        "mse_clip",
        *ratios,
        "Eq. 6 as written / aminmax",
    )
    lines = [f"| tensor | bits | {' | '.join(columns)} |", f"|---|{'---:|' * (len(columns) + 1)}"]
    for row in rows:
        low, high, clip, mse, plain = (1e3 * row[name] for name in ("aminmax", "amax", "octav_clip", "mse_clip", "eq6"))
        lines.append(
            f"| {row['tensor']} | {row['bits']} | {low:.3f} | {high:.3f} | {clip:.3f} | {clip / low:.1f} "
            f"| {clip / high:.1f} | {mse:.3f} | {mse / low:.1f} | {mse / high:.1f} | {plain / low:.0f} |"
        )
    return "\n".join(lines)


def measure(x: torch.Tensor, bits: int, signed: bool, dim: int | None, rounds: int) -> dict[str, float]:
    """Median seconds of each function on `x`."""
    functions: dict[str, Callable[[], Any]] = {
        "aminmax": lambda: torch.aminmax(x) if dim is None else torch.aminmax(x, dim=dim),
        "amax": lambda: x.abs().amax() if dim is None else x.abs().amax(dim=dim),
        "octav_clip": lambda: octav_clip(x, bits, signed=signed, dim=dim),
        "mse_clip": lambda: mse_clip(x, bits, signed=signed, dim=dim),
        "eq6": lambda: plain_recursion(x, bits, signed, dim),
    }
    repeats = max(1, min(200, 10**7 // x.numel()))  # functions that take microseconds are timed many at once
    for function in functions.values():
        function()
    times: dict[str, list[float]] = {name: [] for name in functions}
    for round_number in range(rounds):
        for name, function in functions.items():
            if name == "eq6" and round_number >= 3:
                continue  # slow, and only for comparison
            begin = time.perf_counter()
            for _ in range(repeats):
                function()
            times[name].append((time.perf_counter() - begin) / repeats)
    return {name: statistics.median(values) for name, values in times.items()}


def plain_recursion(x: torch.Tensor, bits: int, signed: bool, dim: int | None) -> torch.Tensor:
    """Eq. 6 in whole-tensor operations until nothing changes, at most 20 updates."""
    magnitudes = x.abs() if signed else x.clamp(min=0)
    dims = tuple(range(x.dim())) if dim is None else (dim,)
    noise = noise_factor(bits, signed)
    nonzero = (magnitudes > 0).sum(dim=dims, keepdim=True)
    clip = magnitudes.sum(dim=dims, keepdim=True) / nonzero
    for _ in range(20):
        outside = magnitudes > clip
        count = outside.sum(dim=dims, keepdim=True)
        total = (magnitudes * outside).sum(dim=dims, keepdim=True)
        before, clip = clip, total / (noise * (nonzero - count) + count)
        if torch.equal(clip, before):
            break
    return clip


if __name__ == "__main__":
    main()
