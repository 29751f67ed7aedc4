"""The frozen clips of a model's activations as plain numbers."""

from __future__ import annotations

from typing import Any

from torch import nn

from octav_hf.conversion.modules import activation_quantizers


def frozen_activations(model: nn.Module) -> dict[str, dict[str, dict[str, Any]]]:
    """Module -> operand -> sign, clips of each call, and the offset of an asymmetric grid; of what is frozen."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for path, operand, quantizer in activation_quantizers(model):
        frozen = quantizer.frozen
        if frozen is not None:
            offset = {} if frozen.offset is None else {"offset": frozen.offset.item()}
            entry = {"signed": frozen.signed, "clips": frozen.clips.tolist(), **offset}
            found.setdefault(path, {})[operand] = entry
    return found
