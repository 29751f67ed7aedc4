"""Layers that read the same tensor, as query, key and value projections do, quantize it once."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .._utils.torch_private import version_counter
from .fake_quantize import FakeQuantize


class _Entry(NamedTuple):
    """An input, what its quantization depended on, and the result."""

    x: Tensor
    state: tuple[object, ...]
    output: Tensor


class _Scope(threading.local):
    entries: list[_Entry] | None = None


_scope = _Scope()


@contextmanager
def shared_inputs() -> Iterator[None]:
    """While active, in this thread, ``quantize_input`` gives one result to quantizers with the same ``cache_key``."""
    before, _scope.entries = _scope.entries, []
    try:
        yield
    finally:
        _scope.entries = before


def quantize_input(quantizer: nn.Module, x: Tensor) -> Tensor:
    """``quantizer(x)``, or what an equal quantizer made of the same tensor within ``shared_inputs``."""
    # A compiler finds the common work by itself.
    if torch.compiler.is_compiling() or _scope.entries is None or not isinstance(quantizer, FakeQuantize):
        return quantizer(x)
    version = None if x.is_inference() else version_counter(x)
    state = (version, torch.is_grad_enabled(), quantizer.cache_key)
    for entry in _scope.entries:
        if entry.x is x and entry.state == state:
            return entry.output
    output = quantizer(x)
    _scope.entries.append(_Entry(x, state, output))
    return output
