"""Elementwise functions, compiled into one loop for large tensors."""

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from ..._utils.torch_private import (
    compilation_errors,
    function_mode_stack,
    tree_map,
    vector_width,
    without_innermost_function_mode,
)
from ..rows import memory_order
from .compilation import can_compile, disable_kernels, kernels_disabled
from .operations import operation

MIN_NUMEL = 1 << 15  # below this, the overhead of a compiled call (50 microseconds) dominates
_RECOMPILE_LIMIT = 64  # dtypes, numbers of dimensions, signs and inference mode give more than torch's default of 8


def fuses(x: Tensor) -> bool:
    """Whether compiled functions are used for ``x``."""
    return x.numel() >= MIN_NUMEL and can_compile(x, ("cpu", "cuda"))


class Elementwise:
    """An elementwise function of tensors of equal shape, and of parameters that broadcast to them or are integers.

    It runs as one custom operation without gradients, compiled into one loop in memory order if the tensors are large.
    A compiler that traces a caller sees the function itself and can fuse it with its neighbours. If compilation fails,
    for example without a C++ compiler, a warning is issued and the function runs uncompiled. ``plain`` is the
    uncompiled function.
    """

    def __init__(self, function: Callable[..., Any], schema: str, tensors: int):
        self.plain = function
        self.__doc__ = function.__doc__
        self._tensors = tensors
        self._compiled: Callable[..., Any] | None = None

        @functools.wraps(function)
        def run(*arguments: Any) -> Any:
            return self._run(arguments[:tensors], arguments[tensors:])

        self._operation = operation(schema, function)(run)

    def __call__(self, *arguments: Any) -> Any:
        tensors = arguments[: self._tensors]
        differentiated = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)  # double backward
        if torch.compiler.is_compiling() or differentiated:
            return self.plain(*arguments)
        return self._operation(*arguments)

    def _run(self, tensors: tuple[Tensor, ...], parameters: tuple[Any, ...]) -> Any:
        first = tensors[0]
        loops = in_loops(tensors, parameters) if fuses(first) else None
        if loops is None:
            return self.plain(*tensors, *parameters)
        order = memory_order(first)
        results = self._call_compiled(first.device.type, *loops[0], *loops[1])
        shape = [first.shape[d] for d in order]
        inverse = sorted(range(first.dim()), key=order.__getitem__)
        return tree_map(lambda result: result.view(shape).permute(inverse), results)

    def _call_compiled(self, device: str, *arguments: Any) -> Any:
        if kernels_disabled():
            return self.plain(*arguments)
        if self._compiled is None:
            self._compiled = torch.compile(  # type: ignore[call-overload]  # its stubs lack recompile_limit
                self.plain,
                dynamic=True,
                fullgraph=True,
                recompile_limit=_RECOMPILE_LIMIT,
                options=vector_width(),
            )
        try:
            with _neutral(device):
                # Detached, because torch.compile would add guards on the base of a view.
                return self._compiled(*(a.detach() if isinstance(a, Tensor) else a for a in arguments))
        except compilation_errors() as error:
            disable_kernels(error)
            return self.plain(*arguments)


def elementwise(schema: str, tensors: int = 1) -> Callable[[Callable[..., Any]], Elementwise]:
    """Decorator: make an ``Elementwise`` of a function with this schema and ``tensors`` leading tensors."""
    return lambda function: Elementwise(function, schema, tensors)


@contextmanager
def _neutral(device: str) -> Iterator[None]:
    """No gradients, autocast or function modes, each of which would cause a recompilation."""
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.autocast(device, enabled=False))
        for _ in range(len(function_mode_stack())):
            stack.enter_context(without_innermost_function_mode())
        yield


def in_loops(tensors: tuple[Tensor, ...], parameters: tuple[Any, ...]) -> tuple[list[Tensor], list[Any]] | None:
    """Views of tensors of equal shape in memory order, and matching parameters; dimensions are merged by ``_loops``.

    ``None`` if the tensors differ in strides or have gaps in memory.
    """
    first = tensors[0]
    order = memory_order(first)
    ordered = first.permute(order)
    if not ordered.is_contiguous() or any(tensor.stride() != first.stride() for tensor in tensors):
        return None
    loops = _loops(ordered.shape, [_in_order(parameter, order) for parameter in parameters])
    if loops is None:
        return None
    sizes, viewed = loops
    return [tensor.permute(order).view(sizes) for tensor in tensors], viewed


def _in_order(parameter: Any, order: list[int]) -> Any:
    """A tensor parameter with its dimensions permuted to ``order``; 0-dim if it has one element."""
    if not isinstance(parameter, Tensor):
        return parameter
    if parameter.numel() == 1:
        return parameter.reshape(())
    return parameter[(None,) * (len(order) - parameter.dim())].permute(order)


def _is_part(parameter: Any) -> bool:
    return isinstance(parameter, Tensor) and parameter.dim() > 0


def _loops(shape: torch.Size, parameters: list[Any]) -> tuple[list[int], list[Any]] | None:
    """Merge the dimensions of ``shape`` and of the parameters, so that few variants are compiled.

    Neighbouring dimensions are merged if the parameters, which are 0-dim or broadcastable to ``shape``, vary along all
    or none of them. ``None`` if parameters have different shapes.
    """
    shapes = {parameter.shape for parameter in parameters if _is_part(parameter)}
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
    return sizes, [p.reshape(of_parameters) if _is_part(p) else p for p in parameters]
