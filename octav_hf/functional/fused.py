"""Functions over large tensors, each compiled into one loop; as they are written where that cannot be had."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import _get_current_function_mode_stack, _pop_mode_temporarily

from .compilation import give_up, given_up, may_serve
from .rows import memory_order

# Elements from which a compiled call (about 50 microseconds before the loop starts) costs less than it saves.
SMALLEST = 1 << 15

# dtypes, ranks, signs and whether tensors were made in inference mode: more than torch's limit of 8.
_VARIANTS = 64


def fuses(x: Tensor) -> bool:
    """Whether work on ``x`` goes to compiled functions."""
    return x.numel() >= SMALLEST and may_serve(x, ("cpu", "cuda"))


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
        if given_up():
            return self.plain(*arguments)
        if self._compiled is None:
            self._compiled = torch.compile(  # type: ignore[call-overload]  # its stubs lack recompile_limit
                self.plain, dynamic=True, fullgraph=True, recompile_limit=_VARIANTS
            )
        # Not at the top: it costs a second that a program without large tensors need not spend.
        from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

        device = arguments[0].device.type
        try:
            with _neutral(device):
                return self._compiled(*(a.detach() if isinstance(a, Tensor) else a for a in arguments))
        except (TorchDynamoException, FailOnRecompileLimitHit) as error:
            give_up(error)
            return self.plain(*arguments)


@contextmanager
def _neutral(device: str) -> Iterator[None]:
    """Grad mode, autocast and function modes as a function was compiled for: it would be compiled anew for others."""
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.autocast(device, enabled=False))
        for _ in range(len(_get_current_function_mode_stack())):
            stack.enter_context(_pop_mode_temporarily())
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
    if torch.compiler.is_compiling():  # makes one loop of it by itself, and cannot sort strides that it does not know
        return function.plain(*tensors, *parameters, *constants)
    first = tensors[0]
    order = memory_order(first)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return function.plain(*tensors, *parameters, *constants)  # a backward pass that is differentiated itself
    same_layout = all(tensor.stride() == first.stride() for tensor in tensors)
    if fuses(first) and same_layout and first.permute(order).is_contiguous():
        if all(parameter.numel() == 1 for parameter in parameters):
            ordered = first.permute(order).shape
            inverse = sorted(range(first.dim()), key=order.__getitem__)
            flat = (tensor.permute(order).view(-1) for tensor in tensors)
            results = function(*flat, *(parameter.reshape(()) for parameter in parameters), *constants)
            return tuple(result.view(ordered).permute(inverse) for result in results)
        per_row = ((), (first.shape[0], 1))
        if first.dim() == 2 and first.is_contiguous() and all(parameter.shape in per_row for parameter in parameters):
            return function(*tensors, *parameters, *constants)
    return function.plain(*tensors, *parameters, *constants)
