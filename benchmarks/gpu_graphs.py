"""Check whether a training step on a GPU synchronizes with the host, and whether it can be replayed as a CUDA graph."""

from __future__ import annotations

import statistics
import warnings
from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from gpu_measure import Row, milliseconds, row, warm_up_on_a_stream
from gpu_steps import make_batch, make_model, training_step

VARIANTS = ("float sdpa", "paper", "accurate", "paper, eager attention", "max")
STEPS = 5  # number of losses that are compared


def host_reads(device: torch.device, quick: bool) -> Iterator[Row]:
    """Synchronizing operations in a step of a model with MiniLM's shape, by source line.

    Without a mask, because Transformers itself reads the mask; and with a mask, to compare with the float model.
    """
    if device.type != "cuda":
        yield {"name": "host reads", "skipped": f"counted on CUDA devices, not on {device}"}
        return
    for variant in VARIANTS:
        for with_mask in (False, True):
            name = f"{variant}, {'with' if with_mask else 'no'} mask"
            yield row(name, partial(reads_of_a_step, variant, with_mask, device, quick))


def reads_of_a_step(variant: str, with_mask: bool, device: torch.device, quick: bool) -> Row:
    """Whether a step passes in the sync debug mode "error", and the number of warnings in the mode "warn"."""
    batch = make_batch(device, quick)
    if not with_mask:
        del batch["attention_mask"]
    step = training_step(make_model("MiniLM", variant, device, quick), batch)
    for _ in range(3):
        step()
    try:
        torch.cuda.set_sync_debug_mode("error")
        step()
        result: Row = {"sync debug mode error": "passes"}
    except RuntimeError as error:
        result = {"sync debug mode error": f"fails: {str(error)[:100]}"}
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    places = Counter(place(warning) for warning in caught if "synchroniz" in str(warning.message))
    return result | {"reads": places.total(), "places": dict(places.most_common(20))}


def place(warning: Any) -> str:
    return f"{'/'.join(warning.filename.split('/')[-3:])}:{warning.lineno}"


def cuda_graphs(device: torch.device, quick: bool) -> Iterator[Row]:
    """A step (forward, backward, AdamW) without dropout as a CUDA graph, compared with the same eager steps."""
    if device.type != "cuda":
        yield {"name": "CUDA graphs", "skipped": f"recorded on CUDA devices, not on {device}"}
        return
    for variant in VARIANTS:
        yield row(variant, partial(replayed_step, variant, device, quick))


def replayed_step(variant: str, device: torch.device, quick: bool) -> Row:
    """The largest relative difference of the losses, and the time of a step eagerly and as a graph."""
    batch = make_batch(device, quick)
    del batch["attention_mask"]
    steps = [
        training_step(make_model("MiniLM", variant, device, quick, dropout=0.0), batch, capturable=True)
        for _ in range(2)
    ]
    for step in steps:
        warm_up_on_a_stream(step)
    plain, recorded = steps
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = recorded()
    expected = [float(plain()) for _ in range(STEPS)]
    replayed = []
    for _ in range(STEPS):
        graph.replay()
        replayed.append(float(loss))
    difference = max(abs(a / b - 1) for a, b in zip(replayed, expected, strict=True))
    times = [statistics.median(milliseconds(run, device) for _ in range(10)) for run in (plain, graph.replay)]
    return {
        "loss difference": difference,
        "losses": [round(value, 4) for value in replayed],
        "ms eager": times[0],
        "ms replayed": times[1],
    }
