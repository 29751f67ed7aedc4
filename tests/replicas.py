"""Replicas of a model as ``nn.DataParallel`` makes them, on one device."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

Model = TypeVar("Model", bound=nn.Module)


def replica_of(model: Model) -> Model:
    """What ``torch.nn.parallel.replicate`` makes of a model: its weights are differentiable copies, not parameters."""
    replicas = {module: module._replicate_for_data_parallel() for module in model.modules()}
    copies: dict[nn.Parameter, object] = {}
    for module, replica in replicas.items():
        for name, child in module._modules.items():
            replica._modules[name] = None if child is None else replicas[child]
        for name, parameter in module._parameters.items():
            if parameter is None:
                replica._parameters[name] = None
            else:
                setattr(replica, name, copies.setdefault(parameter, parameter.clone()))
        for name, buffer in module._buffers.items():
            replica._buffers[name] = None if buffer is None else buffer.clone()
    return replicas[model]
