"""Elementwise functions compiled into one loop over a large tensor."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from ..._utils.torch_private import compilation_errors, function_mode_stack, without_innermost_function_mode
from ..rows import memory_order
from .compilation import can_compile, disable_kernels, kernels_disabled

MIN_NUMEL = 1 << 15  # elements from which a compiled call, with an overhead of 50 microseconds, is faster
_RECOMPILE_LIMIT = 64  # dtypes, ranks, signs and inference mode give more variants than torch's default of 8


def fuses(x: Tensor) -> bool:
    """Whether compiled functions are used for ``x``."""
    return x.numel() >= MIN_NUMEL and can_compile(x, ("cpu", "cuda"))


class fused:
    """Decorator: calls run the function compiled, without gradients and for tensors of any size.

    If compilation fails, for example without a C++ compiler, a warning is issued and the function runs as it is
    written, which is also available as ``plain``.
    """

    def __init__(self, function: Callable[..., Any]):
        self.plain = function
        self.__doc__ = function.__doc__
        self._compiled: Callable[..., Any] | None = None

    def __call__(self, *arguments: Any) -> Any:
        if kernels_disabled():
            return self.plain(*arguments)
        if self._compiled is None:
            self._compiled = torch.compile(  # type: ignore[call-overload]  # its stubs lack recompile_limit
                self.plain, dynamic=True, fullgraph=True, recompile_limit=_RECOMPILE_LIMIT
            )
        try:
            with _neutral(arguments[0].device.type):
                return self._compiled(*(a.detach() if isinstance(a, Tensor) else a for a in arguments))
        except compilation_errors() as error:
            disable_kernels(error)
            return self.plain(*arguments)


@contextmanager
def _neutral(device: str) -> Iterator[None]:
    """Grad mode, autocast and function modes that do not cause recompilation."""
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.autocast(device, enabled=False))
        for _ in range(len(function_mode_stack())):
            stack.enter_context(without_innermost_function_mode())
        yield


def elementwise(
    function: fused, tensors: tuple[Tensor, ...], parameters: tuple[Tensor, ...], *constants: Any
) -> tuple[Tensor, ...]:
    """``function(*tensors, *parameters, *constants)``, elementwise, as one loop in memory order if possible.

    ``tensors`` and the results have one shape, to which ``parameters`` are broadcastable.
    """
    first = tensors[0]
    differentiated = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)  # double backward
    # A compiler fuses the plain function itself, and does not know the strides to sort.
    if torch.compiler.is_compiling() or differentiated or not fuses(first):
        return function.plain(*tensors, *parameters, *constants)
    order = memory_order(first)
    ordered = first.permute(order)
    same_layout = ordered.is_contiguous() and all(tensor.stride() == first.stride() for tensor in tensors)
    loops = _loops(ordered.shape, [_in_order(parameter, order) for parameter in parameters]) if same_layout else None
    if loops is None:
        return function.plain(*tensors, *parameters, *constants)
    sizes, viewed = loops
    results = function(*(tensor.permute(order).view(sizes) for tensor in tensors), *viewed, *constants)
    inverse = sorted(range(first.dim()), key=order.__getitem__)
    return tuple(result.view(ordered.shape).permute(inverse) for result in results)


def _in_order(parameter: Tensor, order: list[int]) -> Tensor:
    """``parameter`` with dimensions as in ``order``; 0-dim if it is a single number."""
    if parameter.numel() == 1:
        return parameter.reshape(())
    return parameter[(None,) * (len(order) - parameter.dim())].permute(order)


def _loops(shape: torch.Size, parameters: list[Tensor]) -> tuple[list[int], list[Tensor]] | None:
    """``shape``, of a contiguous tensor, and the parameters with as few dimensions as possible.

    Merges neighbouring dimensions if the parameters, which are 0-dim or broadcastable to ``shape``, vary along all or
    none of them, so that few variants are compiled. ``None`` if the parameters differ in this.
    """
    shapes = {parameter.shape for parameter in parameters if parameter.dim()}
    if len(shapes) > 1:
        return None
    sizes: list[int] = []
    of_parameters: list[int] = []
    varied = None
    for size, values in zip(shape, *shapes or [torch.Size([1] * len(shape))], strict=True):
        if size == 1:
            continue
        if (values > 1) is varied:
            sizes[-1], of_parameters[-1] = sizes[-1] * size, of_parameters[-1] * values
        else:
            sizes.append(size)
            of_parameters.append(values)
        varied = values > 1
    return sizes, [parameter.reshape(of_parameters) if parameter.dim() else parameter for parameter in parameters]
