"""Custom operations: compilers, fake tensors and dispatch modes see the computation of a clip as one operation."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_NAMESPACE = "octav_hf"
_library = torch.library.Library(_NAMESPACE, "DEF")

_kernels: dict[str, Any] = {}
"""Device type -> module with faster functions, named like the operations, and ``is_supported(x)``."""


class NotFinite(ValueError):
    """A row holds NaN or Inf and has no clip. Callers, who know the tensor's name, raise a detailed error."""


def operation(
    schema: str, fake: Callable[..., Tensor], prepare: Callable[[Tensor], Tensor] = lambda x: x
) -> Callable[[Callable[..., Tensor]], Any]:
    """Decorator: register a function of torch operations as a custom operation of the same name.

    The function runs on every device for which no kernel is registered, so it must not read values on the host.

    Args:
        schema: arguments and result in the notation of ``torch.library``, without the name; the first is a tensor.
        fake: fake implementation: the same arguments -> an empty result.
        prepare: applied to the first argument before the function or the kernel gets it.
    """

    def declare(function: Callable[..., Tensor]) -> Any:
        name = function.__name__

        def reference(x: Tensor, *others: Any) -> Tensor:
            return function(prepare(x), *others)

        def run(x: Tensor, *others: Any) -> Tensor:
            kernels: Any = _kernels.get(x.device.type)
            # is_supported may load and compile kernels, so ask it only if this operation has one.
            if hasattr(kernels, name) and kernels.is_supported(x):
                return getattr(kernels, name)(prepare(x), *others)
            return reference(x, *others)

        # Any strides are accepted, so that Inductor passes its buffers without a copy.
        _library.define(f"{name}{schema}", tags=torch.Tag.flexible_layout)
        _library.impl(name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{_NAMESPACE}::{name}", fake, lib=_library)
        overload = getattr(torch.ops, _NAMESPACE).__getattr__(name).default
        overload.reference = reference
        return overload

    return declare


def use_kernels(device_type: str, kernels: Any) -> None:
    """Use the functions of a module for the operations of the same names on a device.

    They take the same arguments. The module's ``is_supported(x)`` tells whether they accept the first argument.
    """
    _kernels[device_type] = kernels
