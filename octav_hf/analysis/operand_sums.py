"""Sums over the calls of one quantizer, which stay on the device."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..functional.grid import integer_range, round_to_step, step_size
from ..functional.rows import statistics_dtype
from ..nn import FakeQuantize
from ..nn.codes import Grid


class Sums(NamedTuple):
    """Sums over all calls; ``clipped``, ``nonzero`` and ``zeroed`` are numbers of elements."""

    signal: float  # sum(x²)
    noise: float  # sum((x - Q(x))²)
    clipped: float
    nonzero: float
    zeroed: float  # those of the nonzero elements that became 0
    clip: float  # sum of the clips
    signed_calls: float
    asymmetric_calls: float
    minus_lowest: float
    highest: float
    minus_lowest_clip: float
    highest_clip: float


_MAXIMA = 4  # number of fields at the end that are maxima instead of sums


class OperandSums:
    """Adds up the calls of a quantizer, without reading from the device.

    Attributes:
        elements, calls, clips: numbers of these.
        values: the fields of ``Sums``, ``[12]`` float64 on the device of the operand; ``None`` before the first call.
    """

    def __init__(self) -> None:
        self.elements = self.calls = self.clips = 0
        self.values: Tensor | None = None

    def add(self, quantizer: FakeQuantize, x: Tensor, quantized: Tensor, grid: Grid) -> None:
        """Add one call: ``quantized`` is ``x``, of any shape but not empty, rounded to ``grid``."""
        dtype, groups = statistics_dtype(x.dtype), quantizer.active_groups
        x, quantized = x.to(dtype), quantized.to(dtype)
        signed = torch.as_tensor(grid.signed, dtype=torch.bool, device=x.device)
        offset = torch.zeros((), dtype=dtype, device=x.device) if grid.offset is None else grid.offset
        clip = grid.clip if groups is None else groups.of_elements(grid.clip, x)
        value = x if grid.offset is None else x - offset
        nonzero = torch.count_nonzero(x)
        sums = [
            energy(x),
            energy(x - quantized),
            torch.count_nonzero(value - value.clamp(-clip * signed, clip)),
            nonzero,
            nonzero - _nonzero_after(quantizer, quantized, clip, grid),
            grid.clip.sum(dtype=torch.float64),
            signed,
            offset < 0,
        ]
        maxima = [-x.amin(), x.amax(), -grid.clip.amin(), grid.clip.amax()]
        values = torch.stack([value.double() for value in (*sums, *maxima)])
        self.values = values if self.values is None else _together(self.values, values)
        self.elements += x.numel()
        self.calls += 1
        self.clips += grid.clip.numel()


def read(sums: list[OperandSums]) -> list[Sums | None]:
    """The sums of several operands, by one read from each device; ``None`` for those without calls."""
    by_device: dict[torch.device, list[int]] = {}
    for index, each in enumerate(sums):
        if each.values is not None:
            by_device.setdefault(each.values.device, []).append(index)
    found: list[Sums | None] = [None] * len(sums)
    for indices in by_device.values():
        rows = torch.stack([sums[index].values for index in indices])  # type: ignore[misc]
        for index, row in zip(indices, rows.tolist(), strict=True):
            found[index] = Sums(*row)
    return found


def energy(x: Tensor) -> Tensor:
    """``sum(x²)``, float64 ``[]``; rows are summed in the dtype of ``x``, for speed, and their sums in float64."""
    return torch.linalg.vector_norm(x, dim=-1).double().square().sum()


def decibels(signal: float, noise: float) -> float | None:
    """``10 log10(signal / noise)``; ``inf`` without noise, ``None`` without a signal."""
    if not signal:
        return None
    return 10 * math.log10(signal / noise) if noise else math.inf


def _nonzero_after(quantizer: FakeQuantize, quantized: Tensor, clip: Tensor, grid: Grid) -> Tensor:
    """Number of elements that are not rounded to 0, or on an asymmetric grid to the level nearest to 0."""
    if grid.offset is None:
        return torch.count_nonzero(quantized)
    step = step_size(clip, quantizer.num_bits, grid.signed)
    zero = grid.offset + round_to_step(-grid.offset, step, *integer_range(quantizer.num_bits, signed=False))
    return ((quantized - zero).abs() > step / 2).sum()


def _together(before: Tensor, now: Tensor) -> Tensor:
    first = len(before) - _MAXIMA
    return torch.cat([before[:first] + now[:first], torch.maximum(before[first:], now[first:])])
