"""Buffers and parameters that keep their dtype when the model is moved to another."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .._utils.torch_private import own_parameters
from ..functional.rows import statistics_dtype


class FullPrecisionBuffers(nn.Module):
    """Mixin: buffers and own parameters follow the model to another device, but keep their dtype.

    They also keep it if a state dict has a narrower one. Clips and scales stay in full precision (section 3 of the
    paper).
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        parameters = {name: value.data for name, value in own_parameters(self).items() if value is not None}
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            moved = self._buffers[name]
            if moved is not None and moved.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(moved.device)
        for name, values in parameters.items():
            moved = own_parameters(self)[name]
            if moved is not None and moved.dtype != values.dtype:
                moved.data = values.to(moved.device)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in (*self._buffers, *own_parameters(self)):
            tensor = state_dict.get(f"{prefix}{name}")
            if isinstance(tensor, Tensor) and tensor.is_floating_point():  # assign=True makes it the buffer
                state_dict[f"{prefix}{name}"] = tensor.to(statistics_dtype(tensor.dtype))
        super()._load_from_state_dict(state_dict, prefix, *args)
