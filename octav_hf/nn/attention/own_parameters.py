"""The parameters of an attention module, and which tensors share their memory."""

from collections.abc import Collection

import torch
from torch import Tensor, nn

from ..._utils.torch_private import own_parameters, storage_id, view_base


def split_parameters(attention: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """The attention module's own parameters, and those of the modules that it calls.

    Parameters of containers without a forward, such as ``nn.ParameterList``, count as its own.
    """
    own: list[Tensor] = []
    of_modules: list[Tensor] = []
    pending = [(attention, own)]
    while pending:
        module, found = pending.pop()
        found += [value for value in own_parameters(module).values() if value is not None]
        for child in module.children():
            is_own = found is own and type(child).forward is nn.Module.forward
            pending.append((child, own if is_own else of_modules))
    return own, of_modules


def overlaps(x: Tensor, others: Collection[Tensor]) -> bool:
    """Whether ``x`` shares memory with one of ``others``, as a view or through ``.data``.

    While ``torch.compile`` traces, tensors have no memory; then only ``others`` themselves and their views are found.
    """
    if not others:
        return False
    if torch.compiler.is_dynamo_compiling():
        return is_view_of(x, others)
    try:
        storage = storage_id(x)
        near = [other for other in others if storage_id(other) == storage]
    except NotImplementedError:  # some tensors, such as sparse ones, have no storage
        return any(x is other for other in others)
    # With FSDP and ZeRO, parameters of several modules share one storage.
    return any(_begin(x) < _end(other) and _begin(other) < _end(x) for other in near)


def is_view_of(x: Tensor, others: Collection[Tensor]) -> bool:
    """Whether ``x`` is one of ``others`` or a view of one."""
    base = view_base(x)
    return any(x is other or base is other for other in others)


def _begin(x: Tensor) -> int | torch.SymInt:
    return x.storage_offset() * x.element_size()


def _end(x: Tensor) -> int | torch.SymInt:
    """Offset of the byte after the last one; ``_begin`` for an empty tensor."""
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return _begin(x) + (last + 1) * x.element_size() if x.numel() else _begin(x)
