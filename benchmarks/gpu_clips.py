"""Clips on a device: their accuracy against float64, and their time against a copy of the tensor."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial

import torch
from gpu_measure import Row, interleaved, row, warm_up_on_a_stream

from octav_hf.functional import max_clip, mse_clip, octav_clip

RULES = {"octav": octav_clip, "mse": mse_clip, "max": max_clip}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BITS = (2, 4, 8)
JUDGED_ROWS = 16
CANDIDATES = 1000  # clips in the sweep with which mse is compared
COLD_BYTES = 2**28  # exceeds the cache


def accuracy(device: torch.device, quick: bool) -> Iterator[Row]:
    """The worst of signed and unsigned data at each number of bits."""
    for rule, parts, dtype in itertools.product(RULES, ("tensor", "rows"), DTYPES):
        dtype_name = str(dtype).removeprefix("torch.")
        yield row(f"{rule}, {parts}, {dtype_name}", partial(worst, rule, parts, dtype, device, quick))


def worst(rule: str, parts: str, dtype: torch.dtype, device: torch.device, quick: bool) -> Row:
    """The largest deviation from the reference, where it occurs, and the largest deviation from the CPU's clips."""
    dim = None if parts == "tensor" else 1
    found, apart = [], []
    for signed, bits in itertools.product((True, False), BITS):
        x = values(signed, (16, 512) if quick else (2048, 1024), dtype).to(device)
        clips = RULES[rule](x, bits, signed=signed, dim=dim).double().reshape(-1)
        judged = x if dim is None else x[:JUDGED_ROWS]
        on_cpu = RULES[rule](judged.cpu(), bits, signed=signed, dim=dim).double().reshape(-1)
        apart.append((clips[: len(on_cpu)].cpu() / on_cpu - 1).abs().max())
        for line, clip in zip(x.double().reshape(len(clips), -1)[: 2 if quick else JUDGED_ROWS], clips, strict=False):
            found.append((distance(rule, line, clip, bits, signed), f"{bits} bits {'' if signed else 'un'}signed"))
    distances, places = zip(*found, strict=True)
    largest = torch.tensor(distances, dtype=torch.float64).argmax()  # NaN counts as the largest
    measure = "error over the best" if rule == "mse" else "relative to float64"
    from_cpu = float(torch.stack(apart).max())
    return {"worst": distances[largest], "at": places[largest], "is": measure, "from the CPU's clip": from_cpu}


def values(signed: bool, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """Random values: with long tails on both sides if `signed`, otherwise probabilities."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator)
    return (x * torch.randn(shape, generator=generator).exp() if signed else torch.softmax(3 * x, dim=-1)).to(dtype)


def distance(rule: str, x: torch.Tensor, clip: torch.Tensor, bits: int, signed: bool) -> float:
    """For mse, the relative excess of the clip's error over the best one; otherwise its relative difference to float64.

    Args:
        x: float64 `[n]`.
        clip: float64 `[]`.
    """
    peak = (x.abs() if signed else x.clamp(min=0)).max()
    if rule == "mse":
        levels = 2.0 ** (bits - 1 if signed else bits)
        top = peak * levels / (levels - 1)
        shares = torch.arange(1, CANDIDATES + 1, dtype=torch.float64, device=x.device) / CANDIDATES
        clips = torch.cat([clip.reshape(1), shares * top])
        errors = squared_errors(x.sort().values, clips, bits, signed)
        return float(errors[0] / errors.min() - 1)
    expected = peak if rule == "max" else octav_fixed_point(x, bits, signed)
    return float((clip / expected - 1).abs())


def octav_fixed_point(x: torch.Tensor, bits: int, signed: bool) -> torch.Tensor:
    """Where `h(s) = c s #{0 < |x| <= s} - sum (|x| - s)+` changes sign, from sorted magnitudes in float64."""
    magnitudes = (x.abs() if signed else x.clamp(min=0)).sort(descending=True).values
    magnitudes = magnitudes[magnitudes > 0]
    noise = 4.0**-bits / (3 if signed else 12)
    # Equal values before each element add nothing to the sum of differences.
    above = torch.arange(len(magnitudes), dtype=torch.float64, device=x.device)
    sums = magnitudes.cumsum(0) - magnitudes
    slope = noise * magnitudes * (len(magnitudes) - above) - (sums - above * magnitudes)
    last = int((slope >= 0).sum())  # the sign changes between the last of these and the next magnitude
    total, count = magnitudes[:last].sum(), last
    fixed_point = total / (noise * (len(magnitudes) - count) + count)
    below = magnitudes[last] if last < len(magnitudes) else torch.zeros_like(total)
    return fixed_point.clamp(min=below, max=magnitudes[last - 1])


def squared_errors(x: torch.Tensor, clips: torch.Tensor, bits: int, signed: bool) -> torch.Tensor:
    """Squared error of sorted `x`, float64 `[n]`, for each of `clips`, `[k]`, from sums between rounding thresholds."""
    levels = 2 ** (bits - 1) if signed else 2**bits
    integers = torch.arange(-levels if signed else 0, levels, dtype=torch.float64, device=x.device)
    grid = integers * (clips / levels)[:, None]
    borders = torch.searchsorted(x, (grid[:, 1:] + grid[:, :-1]) / 2)
    ends = torch.zeros(len(clips), 1, dtype=torch.int64, device=x.device)
    edges = torch.cat([ends, borders, ends + len(x)], dim=1)
    sums = torch.cat([x.new_zeros(1), x.cumsum(0)])
    return x.square().sum() - 2 * (grid * sums[edges].diff()).sum(1) + (grid.square() * edges.diff()).sum(1)


def speed(device: torch.device, quick: bool) -> Iterator[Row]:
    """Time of clips from the host and as a CUDA graph, whose bandwidth (bytes read) is given as a share of a copy's."""
    size = 48 if quick else 384
    cases = {
        "probabilities 8x12x384x384": ((8, 12, size, size), None, False, (torch.float32, torch.bfloat16)),
        "probabilities by token": ((8, 12, size, size), -1, False, (torch.bfloat16,)),
        "hidden states 32x384x384": ((32, size, size), None, True, (torch.float32, torch.bfloat16)),
        "hidden states by token": ((32, size, size), -1, True, (torch.bfloat16,)),
        "weight rows 1536x384": ((4 * size, size), 1, True, (torch.float32,)),
        "weight rows 384x1536": ((size, 4 * size), 1, True, (torch.float32,)),
    }
    for name, (shape, dim, signed, dtypes) in cases.items():
        for dtype in dtypes:
            full = f"{name}, {str(dtype).removeprefix('torch.')}"
            yield row(full, partial(times_of_clips, shape, dim, signed, dtype, device, quick))


def times_of_clips(
    shape: tuple[int, ...], dim: int | None, signed: bool, dtype: torch.dtype, device: torch.device, quick: bool
) -> Row:
    """Milliseconds of a copy (bytes read and written) and of each rule at 4 bits, for tensors that are not cached."""
    x = torch.randn(shape, device=device, dtype=torch.float32)
    x = (x if signed else torch.softmax(3 * x, dim=-1)).to(dtype)
    count = 2 if quick else min(64, 1 + COLD_BYTES // (x.numel() * x.element_size()))
    tensors = [x, *(x.clone() for _ in range(count - 1))]
    functions = {"clone": torch.clone}
    functions |= {name: partial(rule, num_bits=4, signed=signed, dim=dim) for name, rule in RULES.items()}
    rounds, found = 3 if quick else 15, {"elements": x.numel()}
    calls = {name: partial(of_all, function, tensors) for name, function in functions.items()}
    found |= {f"{name} ms": ms / count for name, ms in interleaved(calls, device, rounds).items()}
    if device.type == "cuda":
        calls = {name: recorded(call).replay for name, call in calls.items()}
        found |= {f"{name} graph ms": ms / count for name, ms in interleaved(calls, device, rounds).items()}
        copy = found["clone graph ms"] / 2
        found |= {f"{name} share": round(copy / found[f"{name} graph ms"], 3) for name in RULES}
    return found


def of_all(function: Callable[[torch.Tensor], torch.Tensor], tensors: list[torch.Tensor]) -> None:
    for x in tensors:
        function(x)


def recorded(call: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """The call as a CUDA graph, whose replay takes the device's time without the host's."""
    graph = torch.cuda.CUDAGraph()
    warm_up_on_a_stream(call)
    with torch.cuda.graph(graph):
        call()
    return graph
