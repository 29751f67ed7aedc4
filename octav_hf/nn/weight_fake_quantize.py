"""The quantizer of a weight, which changes between optimizer steps and not between forward passes."""

from typing import Any

import torch
from torch import Tensor

from ..functional.rows import statistics_dtype
from .fake_quantize import FakeQuantize
from .function_modes import outside_function_modes

_SEED = 0


class WeightFakeQuantize(FakeQuantize):
    """``FakeQuantize`` for a weight ``[rows, ...]`` that keeps its clips until the weight changes.

    In evaluation and in gradient accumulation a weight is met many times. That it has not changed is read off the
    product of its rows with a fixed random vector, and not off its version counter, which writes through ``.data``
    leave alone. A change too small to show in the product is too small to matter to the clips.
    """

    _known: tuple[tuple[Any, ...], Tensor, Tensor] | None = None
    _probe: Tensor | None = None

    @torch.compiler.disable
    @outside_function_modes
    # Under inference mode too the clips are kept for a later training step, which saves them for its backward pass.
    @torch.inference_mode(False)
    @torch.no_grad()
    def compute_clip(self, x: Tensor, signed: bool | None = None) -> Tensor:
        """Clips of ``x``, of the shape that the clipping rule gives for ``dim``: ``[rows, 1, ...]``, or 0-dim."""
        values = x.detach().to(statistics_dtype(x.dtype)).flatten(1)
        with torch.autocast(values.device.type, enabled=False):  # in whose precision small changes would not show
            product = values @ self._random_vector(values)
        if self._known is None or self._known[0] != self.cache_key or not torch.equal(self._known[1], product):
            self._known = self.cache_key, product, super().compute_clip(x, signed)
        return self._known[2]

    def _random_vector(self, values: Tensor) -> Tensor:
        probe, shape = self._probe, values.shape[1:]
        if probe is None or (probe.shape, probe.dtype, probe.device) != (shape, values.dtype, values.device):
            generator = torch.Generator().manual_seed(_SEED)
            probe = torch.rand(shape, generator=generator, device="cpu", dtype=values.dtype).to(values.device) + 0.5
            self._probe = probe
        return probe
