"""Inputs and outputs of layers while a model and its teacher run, up to the layers that are asked for."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .._utils.forward_pass import Batch, run_batch
from .least_squares import LeastSquares
from .padding import decoder_mask, has_decoder, inputs_by_name

_Take = Callable[[Any, Tensor, Tensor], Any]


class _Enough(Exception):
    """Ends a forward pass."""


def groups_by_input(
    model: nn.Module, layers: Mapping[str, nn.Module], batch: Batch
) -> tuple[list[list[str]], dict[str, str]]:
    """The layers' names in the order of execution, neighbours with the same input together; and why others are left."""
    calls = _watch(model, batch, layers, lambda layer, x, output: x, stops=False)
    names = [name for name, _ in calls]
    left = {name: "the first batch did not reach it" for name in layers if name not in names}
    left |= {name: "it was called several times" for name in layers if names.count(name) > 1}
    groups: list[list[str]] = []
    before = None
    for name, x in calls:
        if name in left:
            continue
        if x is before:
            groups[-1].append(name)
        else:
            groups.append([name])
        before = x
    return groups, left


def layer_sums(
    model: nn.Module, teacher: nn.Module, layers: Mapping[str, tuple[Any, nn.Module]], batches: Sequence[Batch]
) -> dict[str, LeastSquares]:
    """The sums over the tokens of all batches, without padding where it is known, by name of the layer.

    Args:
        layers: name -> the quantized layer of ``model``, whose quantized inputs are ``x``, and that of ``teacher``,
            whose outputs are ``y``.

    Raises:
        ValueError: the teacher's layer was not called, or gives another number of tokens or features.
    """
    students, teachers = ({name: pair[role] for name, pair in layers.items()} for role in range(2))
    sums: dict[str, LeastSquares] = {}
    for batch in batches:
        targets = dict(_watch(teacher, batch, teachers, lambda layer, x, output: _rows(output), stops=True))
        masks = _masks(model, batch)
        for name, (x, width) in _watch(model, batch, students, _quantized_input_and_width, stops=True):
            y = targets.get(name)
            if y is None or y.shape != (len(x), width):
                found = "was not called" if y is None else f"gave {tuple(y.shape)}"
                raise ValueError(
                    f"{name}: the teacher's layer {found}, where this one gave {(len(x), width)}, tokens and features; "
                    "take the float model that the quantized one was made from"
                )
            kept = torch.ones(len(x), dtype=torch.bool, device=x.device)
            for mask in masks:
                kept = kept & mask.to(x.device) if mask.shape == kept.shape else kept
            if name not in sums:
                sums[name] = LeastSquares(x.shape[1], width, x.device)
            sums[name].add(x[kept], y.to(x.device)[kept])
    return sums


def _watch(model: nn.Module, batch: Batch, layers: Mapping[str, nn.Module], take: _Take, stops: bool) -> list[Any]:
    """``(name, take(layer, input, output))`` of each call in a forward pass; it ``stops`` when all layers had one."""
    calls: list[Any] = []
    missing = set(layers)

    def hook(name: str, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        calls.append((name, take(layer, args[0] if args else next(iter(kwargs.values())), output)))
        missing.discard(name)
        if stops and not missing:
            raise _Enough

    handles = [layer.register_forward_hook(partial(hook, name), with_kwargs=True) for name, layer in layers.items()]
    try:
        run_batch(model, batch)
    except _Enough:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _quantized_input_and_width(layer: Any, x: Tensor, output: Tensor) -> tuple[Tensor, int]:
    return _rows(layer.input_quantizer(x)), output.shape[-1]


def _rows(x: Tensor) -> Tensor:
    """A copy, ``[tokens, features]``, in float64."""
    return x.reshape(-1, x.shape[-1]).to(torch.float64, copy=True)


def _masks(model: nn.Module, batch: Batch) -> list[Tensor]:
    """The known masks, flat; a layer of an encoder-decoder model may see the tokens of either."""
    if isinstance(batch, Mapping):
        inputs = dict(batch)
    else:
        inputs = inputs_by_name(model, (batch,) if isinstance(batch, Tensor) else tuple(batch), {})
    found = [inputs.get("attention_mask"), decoder_mask(inputs) if has_decoder(model) else None]
    return [mask.bool().flatten() for mask in found if isinstance(mask, Tensor) and mask.dim() == 2]
