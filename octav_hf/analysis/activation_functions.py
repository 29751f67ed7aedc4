"""Which layers' inputs come straight from an activation function, such as GELU."""

import re
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from .._utils.forward_pass import Batch, device_of, in_evaluation_mode, on_device, run_batch, without_trace
from ..nn import QuantizedLayer

_MODULES = ("torch.nn.modules.activation", "transformers.activations")  # where activation functions are defined


def activation_functions(model: nn.Module, batch: Batch) -> dict[str, str]:
    """Full name of a quantized layer -> name of the activation function, such as ``"GELU"``, whose output is its input.

    They are found in a forward pass on ``batch``, if the function is a module and the layer reads its output directly
    or through dropout, which is off.
    """
    found: dict[str, str] = {}
    latest: dict[int, tuple[Tensor, str]] = {}  # by id of the output, which is unique while the output is kept here

    def after_function(module: nn.Module, _: Any, output: Any) -> None:
        latest[id(output)] = output, re.sub("Activation$", "", type(module).__name__)

    def before_layer(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            if args and id(args[0]) in latest:
                found[name] = latest[id(args[0])][1]

        return hook

    with ExitStack() as hooks, in_evaluation_mode(model), without_trace(model) as runnable:
        for name, module in runnable.named_modules():
            if isinstance(module, QuantizedLayer):
                hooks.callback(module.register_forward_pre_hook(before_layer(name)).remove)
            elif type(module).__module__ in _MODULES and not isinstance(module, nn.MultiheadAttention):
                hooks.callback(module.register_forward_hook(after_function).remove)
        run_batch(runnable, on_device(batch, device_of(model)))
    return found
