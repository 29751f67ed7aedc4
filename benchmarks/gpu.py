"""All measurements on a GPU in one command: clips, steps, host reads, memory, CUDA graphs, other libraries.

    python benchmarks/gpu.py --output gpu.json                             # at most nine minutes
    python benchmarks/gpu.py --device cpu --quick --parts clip_accuracy    # the same code on small tensors, as a test

Each part runs in its own process, in order of importance. A part that fails, hangs or breaks the device is recorded,
and the next one runs. Parts for which there was no time are listed. It needs only the package: models have random
weights.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import gpu_clips
import gpu_graphs
import gpu_steps
import torch

NO_DEVICE = "no CUDA device: not run on a GPU"
Row = dict[str, Any]


class Part(NamedTuple):
    """A part that runs in one process: a generator of rows, and its time limit in seconds."""

    rows: Callable[[torch.device, bool], Iterator[Row]]
    limit: float


PARTS = {
    "clip_accuracy": Part(gpu_clips.accuracy, 90),
    "clip_speed": Part(gpu_clips.speed, 60),
    "minilm_eager": Part(gpu_steps.minilm_eager, 90),
    "cuda_graphs": Part(gpu_graphs.cuda_graphs, 60),
    "minilm_compiled": Part(gpu_steps.minilm_compiled, 270),
    "host_reads": Part(gpu_graphs.host_reads, 60),
    "bert_base_eager": Part(gpu_steps.bert_base_eager, 90),
    "bert_base_compiled": Part(gpu_steps.bert_base_compiled, 270),
    "other_libraries": Part(gpu_steps.other_libraries, 90),
    "minilm_bfloat16": Part(gpu_steps.minilm_bfloat16, 60),
}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run the parts, print tables, and return what they found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=540, help="time for all parts together")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--quick", action="store_true", help="small tensors and models, whose figures say nothing")
    parser.add_argument("--output", type=Path, help="JSON file for the figures, written after each part")
    parser.add_argument("--part", choices=list(PARTS), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.part:
        for row in PARTS[options.part].rows(torch.device(options.device), options.quick):
            print(json.dumps(row), flush=True)
        return {}

    end = time.monotonic() + options.seconds
    result: dict[str, Any] = {"machine": machine(options.device), "parts": {}}
    if options.device == "cuda" and not torch.cuda.is_available():
        print(NO_DEVICE)
        result |= {"not_run": NO_DEVICE, "left_out": options.parts}
        options.parts = []
    for name in options.parts:
        left = end - time.monotonic()
        if left > 0:
            result["parts"][name] = in_a_process(name, options, min(left, PARTS[name].limit))
            print(table(name, result["parts"][name]), flush=True)
        else:
            result.setdefault("left_out", []).append(name)
        write(result, options.output)
    if left_out := result.get("left_out"):
        print(f"Left out: {', '.join(left_out)}")
    write(result, options.output)
    return result


def machine(device: str) -> Row:
    """Facts about the machine."""
    found: Row = {"torch": torch.__version__, "cuda": torch.version.cuda, "device": device, "cpu_cores": os.cpu_count()}
    try:
        import triton

        found["triton"] = triton.__version__
    except ImportError:
        found["triton"] = None
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {"device": properties.name, "gib": round(properties.total_memory / 2**30, 1)}
        found |= {"capability": f"{properties.major}.{properties.minor}", "driver": driver()}
    print(", ".join(f"{name} {value}" for name, value in found.items()))
    return found


def driver() -> str:
    """The driver version according to `nvidia-smi`."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30).stdout.split("\n")[0]
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"unknown: {error}"


def in_a_process(name: str, options: argparse.Namespace, limit: float) -> dict[str, Any]:
    """The rows of a part, including those before a failure or timeout, and the reason for one."""
    command = [sys.executable, __file__, "--part", name, "--device", options.device]
    command += ["--quick"] if options.quick else []
    begin = time.monotonic()
    # Files, because a pipe would have to be read until the last compiler process has closed it.
    with tempfile.TemporaryFile("w+") as rows, tempfile.TemporaryFile("w+") as errors:
        try:
            code = subprocess.run(command, stdout=rows, stderr=errors, timeout=limit).returncode
            ended = f"exit status {code}" if code else ""
        except subprocess.TimeoutExpired:
            ended = f"stopped after {limit:.0f} s"
        rows.seek(0)
        errors.seek(0)
        part: dict[str, Any] = {"rows": [json.loads(line) for line in rows if line.startswith("{")]}
        if ended:
            part |= {"ended": ended, "stderr": errors.read()[-2000:]}
    return part | {"seconds": round(time.monotonic() - begin, 1)}


def table(name: str, part: dict[str, Any]) -> str:
    """A part as a Markdown table with a column per key of its rows."""
    columns = list(dict.fromkeys(key for row in part["rows"] for key in row))
    lines = [f"\n{name}, {part['seconds']} s{', ' * bool(part.get('ended'))}{part.get('ended', '')}\n"]
    if columns:
        lines += [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    lines += [f"| {' | '.join(cell(row.get(column, '')) for column in columns)} |" for row in part["rows"]]
    return "\n".join(lines)


def cell(value: Any) -> str:
    """A value as the text of one cell."""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return " ".join(text.replace("|", "/").split())[:200]


def write(result: dict[str, Any], output: Path | None) -> None:
    """Write the figures so far."""
    if output:
        output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
