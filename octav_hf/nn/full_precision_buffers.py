"""Buffers that keep their dtype when the model is moved to another."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


class FullPrecisionBuffers(nn.Module):
    """Mixin: buffers follow the model to another device, but keep their dtype.

    Clips and scales are kept in full precision (section 3 of the paper).
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            moved = self._buffers[name]
            if moved is not None and moved.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(moved.device)
        return self
