"""The quantizer of a weight, which recomputes clips only after the weight has changed."""

from typing import Any

import torch
from torch import Tensor

from ..functional.rows import Dim, statistics_dtype, to_rows
from .fake_quantize import FakeQuantize, Grid
from .frozen_clips import FrozenClips
from .function_modes import outside_function_modes


class WeightFakeQuantize(FakeQuantize):
    """``FakeQuantize`` for a weight ``[rows, ...]`` that keeps its clips until the weight changes.

    Frozen ``clips`` are as the clipping rule gives them for the weight: ``[rows, 1, ...]``, or 0-dim for one.

    The weight's fingerprint is its matmul with a fixed random vector: the version counter misses writes through
    ``.data``. A change too small to show in it is too small to matter to the clips.
    """

    _known: tuple[tuple[Any, ...], Tensor, Tensor] | None = None
    _probe: Tensor | None = None
    _left_by_calls = (*FakeQuantize._left_by_calls, "_known", "_probe")

    # As clips computed under inference mode; a buffer is saved for the backward pass, too.
    @torch.inference_mode(False)
    @torch.no_grad()
    def freeze_at(self, weight: Tensor) -> None:
        """Freeze the clips at those of ``weight``; ``ValueError`` if it holds NaN or Inf."""
        self.freeze(FrozenClips(True, self.dynamic_clips(weight.detach()).clone()))

    def frozen_problem(self, frozen: FrozenClips, weight_shape: tuple[int, ...], max_calls: int | None) -> str:
        shape = to_rows(torch.empty(weight_shape, dtype=torch.float32, device="meta"), self.dim)[1]
        if frozen.signed and frozen.offset is None and tuple(frozen.clips.shape) == shape:
            return ""
        return (
            f"have the shape {tuple(frozen.clips.shape)}, or are not of the signed grid, and its weight of shape "
            f"{tuple(weight_shape)} needs clips of shape {shape}"
        )

    @property
    def active_dim(self) -> Dim:
        return self.dim

    def compute_clip(self, x: Tensor, signed: bool | None = None) -> Tensor:
        """The frozen clips if there are, else those of ``x``."""
        return self.dynamic_clips(x) if self.clips is None else self.clips

    def _frozen_grid(self, frozen: FrozenClips, x: Tensor, call_index: int) -> Grid:
        return Grid(True, frozen.clips)

    @torch.compiler.disable
    @outside_function_modes
    # Clips computed under inference mode may be kept for a training step, which saves them for its backward pass.
    @torch.inference_mode(False)
    @torch.no_grad()
    def dynamic_clips(self, x: Tensor) -> Tensor:
        """The clips of ``x``, whether clips are frozen or not."""
        values = x.detach().to(statistics_dtype(x.dtype)).flatten(1)
        with torch.autocast(values.device.type, enabled=False):  # whose precision hides small changes
            fingerprint = values @ self._random_vector(values)
        if self._known is None or self._known[0] != self.cache_key or not torch.equal(self._known[1], fingerprint):
            self._known = self.cache_key, fingerprint, super().compute_clip(x)
        return self._known[2]

    def _random_vector(self, values: Tensor) -> Tensor:
        probe, shape = self._probe, values.shape[1:]
        if probe is None or (probe.shape, probe.dtype, probe.device) != (shape, values.dtype, values.device):
            generator = torch.Generator(device="cpu").manual_seed(0)
            probe = torch.rand(shape, generator=generator, device="cpu", dtype=values.dtype).to(values.device) + 0.5
            self._probe = probe
        return probe
