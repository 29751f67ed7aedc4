"""Custom operations: what compilers, fake tensors and dispatch modes see of a clip's computation is one operation."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_NAMESPACE = "octav_hf"
_library = torch.library.Library(_NAMESPACE, "DEF")

_kernels: dict[str, Any] = {}
"""Device type -> module with faster functions of operations' names, and ``is_supported(x)``."""


class NotFinite(ValueError):
    """Rows hold NaN or Inf, so that they have no clip; who knows the tensor and its name says more."""


def operation(
    schema: str, fake: Callable[..., Tensor], prepare: Callable[[Tensor], Tensor] = lambda x: x
) -> Callable[[Callable[..., Tensor]], Any]:
    """Decorator: make a readable function of torch operations a custom operation of its name.

    It runs as it is written where no kernel is faster, on every device, and must not read values on the host.

    Args:
        schema: arguments and result, as ``torch.library`` writes them, without the name; the first one is a tensor.
        fake: the same arguments -> an empty result, for tensors without values.
        prepare: the first argument -> what the function, or the kernel, gets for it.
    """

    def declare(function: Callable[..., Tensor]) -> Any:
        name = function.__name__

        def reference(x: Tensor, *others: Any) -> Tensor:
            return function(prepare(x), *others)

        def run(x: Tensor, *others: Any) -> Tensor:
            kernels: Any = _kernels.get(x.device.type)
            # An operation without a kernel must not load, and perhaps compile, those of others.
            if hasattr(kernels, name) and kernels.is_supported(x):
                return getattr(kernels, name)(prepare(x), *others)
            return reference(x, *others)

        # Strides are any, so that Inductor gives the operation the memory of a result that it writes anyway, no copy.
        _library.define(f"{name}{schema}", tags=torch.Tag.flexible_layout)
        _library.impl(name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{_NAMESPACE}::{name}", fake, lib=_library)
        overload = getattr(torch.ops, _NAMESPACE).__getattr__(name).default
        overload.reference = reference
        return overload

    return declare


def use_kernels(device_type: str, kernels: Any) -> None:
    """Let operations on a device use the functions of a module that have their names, with the same arguments.

    The module's ``is_supported(x)`` says whether they can be used for the first argument.
    """
    _kernels[device_type] = kernels
