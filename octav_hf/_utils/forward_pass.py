"""Running a model on a batch, whatever form that has, and leaving the model as it was."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .torch_private import uncompiled

Batch = Mapping[str, Any] | tuple[Any, ...] | list[Any] | Tensor
"""The forward's keyword arguments, its positional ones, or the only one."""


def check_batch(batch: Any, caller: str) -> None:
    """Raise ``TypeError`` unless ``batch`` has one of the forms of ``Batch``; ``caller`` is for the message."""
    if not isinstance(batch, Mapping | tuple | list | Tensor):
        raise TypeError(
            f"{caller} a batch as a mapping of keyword arguments, such as {{'input_ids': …}}, a tuple of "
            f"positional ones, or a tensor; got {type(batch).__name__}"
        )


def run_batch(model: nn.Module, batch: Batch) -> None:
    """Run the forward of ``model`` once on ``batch``."""
    if isinstance(batch, Mapping):
        model(**batch)
    else:
        model(*((batch,) if isinstance(batch, Tensor) else batch))


@contextmanager
def in_evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Within it the model is in evaluation mode; each of its modules then has the mode it had before."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def without_trace(model: nn.Module) -> Iterator[nn.Module]:
    """Within it no gradient is recorded and nothing compiled; random state and buffers are then as they were before.

    Yields:
        The module to run: ``model``, or what ``torch.compile`` wrapped in it.
    """
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    try:
        with (
            torch.random.fork_rng(devices=list(devices)),
            torch.inference_mode(False),
            torch.no_grad(),
            torch.compiler.set_stance("force_eager"),
        ):
            yield uncompiled(model)
    finally:
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
