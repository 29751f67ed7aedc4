"""Run a model on batches without changing the model."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .progress import progress
from .torch_private import tree_map, uncompiled

Batch = Mapping[str, Any] | tuple[Any, ...] | list[Any] | Tensor
"""Keyword arguments of a forward, positional arguments, or a single argument."""


def check_batch(batch: Any, caller: str) -> None:
    """Raise ``TypeError`` unless ``batch`` is a ``Batch`` of tensors; ``caller`` begins the message."""
    if not isinstance(batch, Mapping | tuple | list | Tensor):
        raise TypeError(
            f"{caller} a batch as a mapping of keyword arguments, such as {{'input_ids': …}}, a tuple of "
            f"positional ones, or a tensor; got {type(batch).__name__}"
        )
    values = batch.values() if isinstance(batch, Mapping) else ()
    if any(isinstance(value, list) for value in values) and not any(isinstance(value, Tensor) for value in values):
        raise TypeError(
            f"{caller} a batch of tensors; got lists ({', '.join(batch)}), as in an example of a dataset. Call the "
            'tokenizer with return_tensors="pt", or write DataLoader(dataset, batch_size=8, '
            "collate_fn=transformers.default_data_collator)"
        )


def device_of(model: nn.Module) -> torch.device | None:
    """The device of the model's first tensor that is not on the meta device; ``None`` if there is none."""
    tensors = (tensor for tensors in (model.parameters(), model.buffers()) for tensor in tensors)
    return next((tensor.device for tensor in tensors if tensor.device.type != "meta"), None)


def on_device(batch: Batch, device: torch.device | None) -> Batch:
    """The batch with its tensors on ``device``; unchanged for ``None``."""

    def move(leaf: Any) -> Any:
        return leaf.to(device) if isinstance(leaf, Tensor) and device is not None else leaf

    if isinstance(batch, Mapping):  # of any class, such as a tokenizer's
        return {name: tree_map(move, value) for name, value in batch.items()}
    return tree_map(move, batch)


def run_batch(model: nn.Module, batch: Batch) -> Any:
    """The output of ``model`` for ``batch``."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*((batch,) if isinstance(batch, Tensor) else batch))


def run_batches(
    model: nn.Module,
    batches: Iterable[Batch],
    function: str,
    description: str | None,
    take: Callable[[Batch, Any], None] | None = None,
) -> None:
    """Run the model on each batch, moved to its device, in evaluation mode, without gradients and compilation.

    Mode, buffers and random state are restored.

    Args:
        function: name of the public function that calls this; errors begin with it.
        description: for the progress bar; ``None`` for none.
        take: gets each batch, on the model's device, and the output.

    Raises:
        TypeError: ``batches`` is not an iterable of ``Batch``.
        ValueError: there is no batch.
    """
    if isinstance(batches, Mapping | Tensor) or not isinstance(batches, Iterable):
        raise TypeError(
            f"{function} takes an iterable of batches, such as a DataLoader, got {type(batches).__name__}; write "
            "[batch] for a single batch"
        )
    device, number = device_of(model), 0
    with in_evaluation_mode(model), without_trace(model) as runnable:
        for number, batch in enumerate(batches if description is None else progress(batches, description), 1):
            check_batch(batch, f"{function} takes a list of batches, and each (here number {number}) is")
            moved = on_device(batch, device)
            output = run_batch(runnable, moved)
            if take is not None:
                take(moved, output)
    if number == 0:
        raise ValueError(f"{function} got no batch, so there is nothing to measure; pass at least one")


@contextmanager
def in_evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Context with the model in evaluation mode; afterwards the mode of each module is restored."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def without_trace(model: nn.Module) -> Iterator[nn.Module]:
    """Context without gradients and compilation; afterwards random state and buffers are restored.

    Yields:
        The module to run: ``model``, or the module inside a ``torch.compile`` wrapper.
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
