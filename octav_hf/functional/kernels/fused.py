"""Functions over large tensors, each compiled into one loop; as they are written where that cannot be had."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from ..._utils.torch_private import compilation_errors, function_mode_stack, without_innermost_function_mode
from ..rows import memory_order
from .compilation import can_compile, disable_kernels, kernels_disabled

# Elements from which a compiled call (about 50 microseconds before the loop starts) costs less than it saves.
MIN_NUMEL = 1 << 15

# dtypes, ranks, signs and whether tensors were made in inference mode: more than torch's limit of 8.
_VARIANTS = 64


def fuses(x: Tensor) -> bool:
    """Whether work on ``x`` goes to compiled functions."""
    return x.numel() >= MIN_NUMEL and can_compile(x, ("cpu", "cuda"))


class fused:
    """Decorator: calling the function runs it compiled; ``plain`` is the function as it is written.

    The function takes and returns tensors, of any size without recompilation, and no gradient flows through it. Where
    compilation fails, for want of a compiler on the machine, say, one warning says so and the plain function serves
    from then on.
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
                self.plain, dynamic=True, fullgraph=True, recompile_limit=_VARIANTS
            )
        device = arguments[0].device.type
        try:
            with _neutral(device):
                return self._compiled(*(a.detach() if isinstance(a, Tensor) else a for a in arguments))
        except compilation_errors() as error:
            disable_kernels(error)
            return self.plain(*arguments)


@contextmanager
def _neutral(device: str) -> Iterator[None]:
    """Grad mode, autocast and function modes as a function was compiled for: it would be compiled anew for others."""
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.autocast(device, enabled=False))
        for _ in range(len(function_mode_stack())):
            stack.enter_context(without_innermost_function_mode())
        yield


def elementwise(
    function: fused, tensors: tuple[Tensor, ...], parameters: tuple[Tensor, ...], *constants: Any
) -> tuple[Tensor, ...]:
    """``function(*tensors, *parameters, *constants)``, as one loop in the order of memory wherever that is possible.

    Args:
        function: an elementwise function that returns a tuple of tensors.
        tensors: of one shape, which is also that of the results.
        parameters: tensors broadcastable against them.
        constants: what else the function takes.
    """
    plain = function.plain
    if torch.compiler.is_compiling():  # makes one loop of it by itself, and cannot sort strides that it does not know
        return plain(*tensors, *parameters, *constants)
    first = tensors[0]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return plain(*tensors, *parameters, *constants)  # a backward pass that is differentiated itself
    order = memory_order(first)
    same_layout = all(tensor.stride() == first.stride() for tensor in tensors)
    if not (fuses(first) and same_layout and first.permute(order).is_contiguous()):
        return plain(*tensors, *parameters, *constants)
    ordered = first.permute(order).shape
    loops = _loops(ordered, [_in_order(parameter, order) for parameter in parameters])
    if loops is None:
        return plain(*tensors, *parameters, *constants)
    sizes, viewed = loops
    results = function(*(tensor.permute(order).view(sizes) for tensor in tensors), *viewed, *constants)
    inverse = sorted(range(first.dim()), key=order.__getitem__)
    return tuple(result.view(ordered).permute(inverse) for result in results)


def _in_order(parameter: Tensor, order: list[int]) -> Tensor:
    """``parameter`` with as many dimensions as there are in ``order``, and in that order; 0-dim if it is one number."""
    if parameter.numel() == 1:
        return parameter.reshape(())
    return parameter[(None,) * (len(order) - parameter.dim())].permute(order)


def _loops(shape: torch.Size, parameters: list[Tensor]) -> tuple[list[int], list[Tensor]] | None:
    """The fewest dimensions in which a contiguous tensor of ``shape`` and the parameters can be seen.

    Neighbouring dimensions become one where the parameters have a value for each element of both, or one for all of
    both. So what is compiled knows few forms: all with one value, rows with one each, rows with the same ones, and so
    on.

    Args:
        shape: of the tensor.
        parameters: 0-dim, or of as many dimensions, each of that size or of 1.

    Returns:
        Sizes of the tensor's dimensions, and the parameters with as many of them; ``None`` if one parameter has values
        along other dimensions than another.
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
