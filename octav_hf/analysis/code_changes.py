"""``CodeChanges``: how many weights moved to another level of their grid between two training steps."""

from collections.abc import Callable
from contextlib import ExitStack
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from .._utils.torch_private import uncompiled
from ..conversion.modules import layers_to_freeze
from ..functional.grid import step_size
from ..nn import WeightFakeQuantize
from ..nn.function_modes import outside_function_modes


class CodeChanges:
    """Context manager: while entered, compares each quantized weight's codes with those of the previous time.

    The code of a weight w is its integer on the grid, ``round(w / step)``. Codes are kept as int8 on the weight's
    device, one byte per weight; only ``result`` reads values. A weight is compared in the first call of its layer after
    entering. Embedding tables are left out because a step reads only some rows, packed weights because they do not
    change.

    Args:
        model: quantized by ``apply_octav``, or containing such a model.
    """

    def __init__(self, model: nn.Module):
        self._layers = layers_to_freeze(uncompiled(model))
        self._codes: dict[str, Tensor] = {}
        self._changed: dict[str, Tensor] = {}  # [], share of the weights, float64
        self._entered = ExitStack()

    def __enter__(self) -> "CodeChanges":
        with ExitStack() as stack:
            for name, layer in self._layers.items():
                stack.callback(layer.weight_quantizer.register_forward_hook(self._hook(name)).remove)
            self._entered = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._entered.close()

    def result(self) -> dict[str, float]:
        """Full name of the layer -> share of its weights whose code changed between the last two times.

        Only layers that ran both times are included, and each change is returned once.
        """
        changed, self._changed = self._changed, {}
        if not changed:
            return {}
        shares = torch.stack([share.to(next(iter(changed.values())).device) for share in changed.values()])
        return dict(zip(changed, shares.tolist(), strict=True))

    def _hook(self, name: str) -> Callable[..., None]:
        calls = count()

        def compare(quantizer: WeightFakeQuantize, args: tuple[Tensor, ...], quantized: Tensor) -> None:
            if next(calls):
                return
            codes = _codes(quantizer, args[0], quantized.detach())
            before = self._codes.get(name)
            if before is not None:
                self._changed[name] = torch.count_nonzero(codes != before).double() / codes.numel()
            self._codes[name] = codes

        return compare


@outside_function_modes
def _codes(quantizer: WeightFakeQuantize, weight: Tensor, quantized: Tensor) -> Tensor:
    """The integers of ``quantized``, int8."""
    clip = quantizer.compute_clip(weight).detach()  # with gradients on, that which the forward pass has kept
    step, groups = step_size(clip, quantizer.num_bits, signed=True), quantizer.active_groups
    step = step if groups is None else groups.of_elements(step, weight.detach())
    return (quantized.to(step.dtype) / torch.where(step > 0, step, 1)).round_().to(torch.int8)
