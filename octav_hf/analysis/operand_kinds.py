"""``operand_kinds``: the operands with the same role in all layers of a model."""

import re
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NamedTuple

from torch import Tensor, nn

from .._utils.forward_pass import Batch, run_batches
from ..conversion.modules import operand_quantizers
from ..nn import FakeQuantize

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


class OperandKind(NamedTuple):
    """Operands with the same role in all layers of a model.

    Attributes:
        modules: full names with ``*`` in place of the numbers of layers; several if these modules read the same tensor.
        operand: ``"weight"``, ``"input"``, ``"query"``, ``"key"``, ``"probabilities"`` or ``"value"``.
    """

    modules: tuple[str, ...]
    operand: str


def operand_kinds(model: nn.Module, batch: Batch) -> dict[OperandKind, list[FakeQuantize]]:
    """The quantizers of each kind of operand, in the order of the model's modules.

    Layers that read the same tensor and quantize it alike, such as query, key and value, get identical values, computed
    once. Their inputs are one kind: with this tensor quantized for some of them only, the model would be one that no
    config describes. A forward pass on ``batch`` finds these layers.

    Args:
        model: quantized by ``apply_octav``. Its mode, buffers and random state are restored.
    """
    merged: dict[str, str] = {}  # pattern of a layer -> pattern of the first layer with the same input
    seen: list[tuple[weakref.ref[Tensor], tuple[Any, ...], str]] = []  # inputs, how they are quantized, and where

    def compare(pattern: str) -> Callable[..., None]:
        def hook(quantizer: FakeQuantize, args: tuple[Any, ...]) -> None:
            x, cache_key = args[0], quantizer.cache_key
            first = next((first for ref, key, first in seen if ref() is x and key == cache_key), None)
            if first is None:
                seen.append((weakref.ref(x), cache_key, merged.get(pattern, pattern)))
            elif first != pattern:
                merged.setdefault(pattern, first)

        return hook

    operands = list(operand_quantizers(model))
    with ExitStack() as stack:
        for module, operand, quantizer in operands:
            if operand == "input":
                stack.callback(quantizer.register_forward_pre_hook(compare(pattern_of(module))).remove)
        run_batches(model, [batch], "operand_kinds", None)
    groups: dict[tuple[str, str], tuple[dict[str, None], list[FakeQuantize]]] = {}
    for module, operand, quantizer in operands:
        pattern = pattern_of(module)
        first = merged.get(pattern, pattern) if operand == "input" else pattern
        patterns, quantizers = groups.setdefault((first, operand), ({}, []))
        patterns[pattern] = None
        quantizers.append(quantizer)
    return {OperandKind(tuple(patterns), operand): found for (_, operand), (patterns, found) in groups.items()}


def pattern_of(module: str) -> str:
    """The full name of a module with ``*`` in place of the numbers of layers."""
    return _NUMBER.sub("*", module)
