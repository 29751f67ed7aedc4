"""Measure time and memory on a device, as rows of figures."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

Row = dict[str, Any]


def row(name: str, measure: Callable[[], Row]) -> Row:
    """The result of `measure` with a name, or its error."""
    try:
        return {"name": name, **measure()}
    except Exception as error:
        return {"name": name, "error": f"{type(error).__name__}: {str(error)[:500]}"}
    finally:
        gc.collect()  # models in reference cycles of quantizers and compilers
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()


def milliseconds(function: Callable[[], Any], device: torch.device, repeats: int = 1) -> float:
    """Milliseconds of one call on the device, averaged over `repeats`."""
    if device.type != "cuda":
        begin = time.perf_counter()
        for _ in range(repeats):
            function()
        return (time.perf_counter() - begin) * 1e3 / repeats
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    start.record()
    for _ in range(repeats):
        function()
    end.record()
    torch.cuda.synchronize(device)
    return start.elapsed_time(end) / repeats


def interleaved(functions: dict[str, Callable[[], Any]], device: torch.device, rounds: int, repeats: int = 1) -> Row:
    """Median milliseconds of each function over interleaved rounds, after two rounds of warm-up."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for round_number in range(rounds + 2):
        for name, function in functions.items():
            taken = milliseconds(function, device, repeats)
            if round_number >= 2:
                times[name].append(taken)
    return {name: statistics.median(values) for name, values in times.items()}


def allocated(device: torch.device, peak: bool = False) -> int:
    """Bytes of tensors on the device, now or at the peak since it was reset; 0 on a CPU."""
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) if peak else torch.cuda.memory_allocated(device)


def warm_up_on_a_stream(step: Callable[[], Any]) -> None:
    """Run three steps on another stream, as recording a CUDA graph requires; the last one leaves no gradients."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
