"""Training steps in bfloat16 on a device, of random models of known shapes: quantized against float.

Autocast over float32 parameters, as in Trainer with `bf16=True`, unless a row tells otherwise; 32 x 384 tokens without
padding, fused AdamW. The float model also runs with `eager` attention, because quantized attention has to store
probabilities, which `sdpa` does not.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial

import peers
import torch
from gpu_measure import Row, allocated, milliseconds, row
from step import random_batch
from torch import nn
from torch._dynamo.utils import counters
from transformers import AutoModelForQuestionAnswering, BertConfig

from octav_hf import OctavConfig, apply_octav

SHAPES = {
    "MiniLM": {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536},
    "BERT-Base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
}
QUICK = {"hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 96}
VARIANTS: dict[str, tuple[str, OctavConfig | None]] = {
    "float sdpa": ("sdpa", None),
    "float eager": ("eager", None),
    "paper": ("sdpa", OctavConfig.paper()),
    "accurate": ("sdpa", OctavConfig.accurate()),
    "paper, eager attention": ("eager", OctavConfig.paper()),
    "max": ("sdpa", OctavConfig.paper(weight_clip="max", activation_clip="max")),
    "float sdpa again": ("sdpa", None),
}
COMPILED = ("float sdpa", "float eager", "paper", "accurate")
MODES = ("default", "reduce-overhead")  # of torch.compile; the second records CUDA graphs
Step = Callable[[], torch.Tensor]


def make_model(
    shape: str,
    variant: str,
    device: torch.device,
    quick: bool,
    dtype: torch.dtype = torch.float32,
    dropout: float = 0.1,
) -> nn.Module:
    """A random model in training mode; the same in every call."""
    attention, config = VARIANTS[variant]
    settings = QUICK if quick else SHAPES[shape]
    bert = BertConfig(**settings, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
    torch.manual_seed(0)
    model = AutoModelForQuestionAnswering.from_config(bert, attn_implementation=attention).to(device, dtype).train()
    return model if config is None else apply_octav(model, config)


def make_batch(device: torch.device, quick: bool) -> dict[str, torch.Tensor]:
    """Random tokens and answers on the device."""
    torch.manual_seed(0)
    return {name: x.to(device) for name, x in random_batch((2, 16) if quick else (32, 384)).items()}


def training_step(model: nn.Module, batch: dict[str, torch.Tensor], autocast: bool = True, **adamw: bool) -> Step:
    """A function that takes one step (forward, backward, AdamW) and returns the loss."""
    device_type = batch["input_ids"].device.type
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True, **adamw)

    def step() -> torch.Tensor:
        # Without the cache of cast weights, which must not outlive the capture of a CUDA graph.
        with torch.autocast(device_type, torch.bfloat16, enabled=autocast, cache_enabled=False):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def minilm_eager(device: torch.device, quick: bool) -> Iterator[Row]:
    return times_of_variants("MiniLM", device, quick)


def minilm_compiled(device: torch.device, quick: bool) -> Iterator[Row]:
    return times_of_compiled("MiniLM", device, quick)


def minilm_bfloat16(device: torch.device, quick: bool) -> Iterator[Row]:
    return times_of_variants("MiniLM", device, quick, dtype=torch.bfloat16)


def bert_base_eager(device: torch.device, quick: bool) -> Iterator[Row]:
    return times_of_variants("BERT-Base", device, quick)


def bert_base_compiled(device: torch.device, quick: bool) -> Iterator[Row]:
    return times_of_compiled("BERT-Base", device, quick)


def times_of_variants(
    shape: str, device: torch.device, quick: bool, dtype: torch.dtype = torch.float32
) -> Iterator[Row]:
    """A row per variant: time and memory, and both relative to float, which comes first."""
    float_rows: dict[str, Row] = {}
    for variant in VARIANTS:
        make = partial(make_model, shape, variant, device, quick, dtype)
        suffix = ", parameters in bfloat16" * (dtype is torch.bfloat16)
        measure = partial(time_of_steps, make, device, quick, autocast=dtype is torch.float32)
        measured = row(f"{shape} {variant}{suffix}", measure)
        if variant in ("float sdpa", "float eager"):
            float_rows[variant] = measured
        yield measured | over_float(measured, float_rows)


def times_of_compiled(shape: str, device: torch.device, quick: bool) -> Iterator[Row]:
    """The same for compiled models. Each compiles in its own process, all at once; then each is measured alone."""
    children = {}
    for variant, mode in itertools.product(COMPILED[1:3] if quick else COMPILED, MODES[:1] if quick else MODES):
        command = [sys.executable, __file__, shape, variant, mode, str(device), *["--quick"] * quick]
        children[variant, mode] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    # A child whose first steps fail prints its row at once.
    first_lines = [child.stdout.readline() for child in children.values()]
    float_rows: dict[str, dict[str, Row]] = {mode: {} for mode in MODES}
    for ((variant, mode), child), first_line in zip(children.items(), first_lines, strict=True):
        output = child.communicate("measure\n")[0] or first_line
        ended = {"name": f"{shape} {variant}, {mode}", "error": f"exit status {child.returncode}"}
        measured = json.loads(output) if output.startswith("{") else ended
        if variant in ("float sdpa", "float eager"):
            float_rows[mode][variant] = measured
        yield measured | over_float(measured, float_rows[mode])


def over_float(measured: Row, float_rows: dict[str, Row]) -> Row:
    """The figures of a row relative to those of float."""
    return {
        f"{key} / {name}": round(measured[key] / other[key], 3)
        for name, other in float_rows.items()
        for key in ("ms", "MiB")
        if measured.get(key) and other.get(key)
    }


def time_of_steps(
    make: Callable[[], nn.Module],
    device: torch.device,
    quick: bool,
    autocast: bool = True,
    mode: str | None = None,
    wait: Callable[[], object] = lambda: None,
) -> Row:
    """Median milliseconds of a step, seconds of the first step, and peak memory including parameters.

    Args:
        mode: of ``torch.compile``; ``None`` to run the model uncompiled.
        wait: called between the first steps and those that are measured.
    """
    before = allocated(device)
    model, batch = make(), make_batch(device, quick)
    step = training_step(model if mode is None else torch.compile(model, mode=mode), batch, autocast)
    begin = time.perf_counter()
    step()
    first = time.perf_counter() - begin
    for _ in range(3):
        step()
    wait()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    times = [milliseconds(step, device) for _ in range(2 if quick else 12)]
    graphs = {} if mode is None else {"graphs": counters["stats"]["unique_graphs"]}
    skipped = {"CUDA graphs skipped": n} if (n := counters["inductor"]["cudagraph_skips"]) else {}
    peak = (allocated(device, peak=True) - before) / 2**20
    return {"ms": statistics.median(times), "MiB": round(peak, 1), "first step s": round(first, 2), **graphs, **skipped}


def other_libraries(device: torch.device, quick: bool) -> Iterator[Row]:
    """The libraries of `peers.py` that are installed, and this package."""
    for name, (package, _, attention, prepare) in peers.LIBRARIES.items():
        version = peers.installed(package)
        if version is None:
            yield {"name": name, "skipped": f"{package} is not installed"}
            continue

        def make(attention: str = attention, prepare: Callable = prepare) -> nn.Module:
            model = make_model("MiniLM", f"float {attention}", device, quick)
            return prepare(model, make_batch(device, quick)).train()

        yield row(f"{name}, {version}", partial(time_of_steps, make, device, quick))


def main(argv: list[str] | None = None) -> None:
    """Compile a variant, tell so, and measure it when a line arrives."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("shape", choices=list(SHAPES))
    parser.add_argument("variant", choices=COMPILED)
    parser.add_argument("mode", choices=MODES)
    parser.add_argument("device", type=torch.device)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args(argv)

    def wait() -> None:
        print("compiled", flush=True)
        if not sys.stdin.readline():  # the other process has ended
            sys.exit(1)

    make = partial(make_model, options.shape, options.variant, options.device, options.quick)
    measure = partial(time_of_steps, make, options.device, options.quick, mode=options.mode, wait=wait)
    print(json.dumps(row(f"{options.shape} {options.variant}, {options.mode}", measure)))


if __name__ == "__main__":
    main()
