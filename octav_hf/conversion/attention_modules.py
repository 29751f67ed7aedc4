"""Finding the modules of a model that compute attention, in models of any library."""

import dis
import functools
import inspect
from collections.abc import Iterator
from types import CodeType, FunctionType
from typing import Any

from torch import nn

from ..nn import QuantizedAttention

# What an attention module's code calls: attention as such, or a softmax and matmuls.
_ATTENTION = {"scaled_dot_product_attention", "ALL_ATTENTION_FUNCTIONS", "multi_head_attention_forward"}
_SOFTMAX = {"softmax", "Softmax"}
_MATMUL = {"matmul", "bmm", "baddbmm", "einsum", "@"}


def attention_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Name and module of those that compute attention.

    These are the modules whose code does, and of the rest those that are called so by their class or one that it
    derives from; the innermost of each where one contains another. What has neither parameters nor that name, as the
    parts of a loss, is not looked for.
    """
    modules = list(model.named_modules())
    attending = _innermost([module for _, module in modules if _attends(module)])
    related = {child for module in attending for child in module.modules()}
    related |= {module for _, module in modules if any(child in attending for child in module.modules())}
    rest = [module for _, module in modules if module not in related and any(True for _ in module.children())]
    called = _innermost([module for module in rest if _is_called_attention(module)])
    return ((name, module) for name, module in modules if module in attending or module in called)


def _innermost(modules: list[nn.Module]) -> set[nn.Module]:
    among = set(modules)
    return {module for module in modules if len(among.intersection(module.modules())) == 1}


def _attends(module: nn.Module) -> bool:
    cls: Any = type(module)
    return attends(cls) and (_is_called_attention(module) or any(True for _ in module.parameters()))


def _is_called_attention(module: nn.Module) -> bool:
    return any("Attention" in base.__name__ for base in type(module).__mro__)


@functools.cache
def attends(cls: Any) -> bool:
    """Whether the code of a module class, its forward and what that calls in the class and its file, is attention."""
    own: Any = next(base for base in cls.__mro__ if not issubclass(base, QuantizedAttention))
    names: set[str] = set()
    waiting, seen = [inspect.unwrap(own.forward)], set()
    while waiting:
        function = waiting.pop()
        if not isinstance(function, FunctionType) or function in seen:
            continue
        seen.add(function)
        used = _names(function.__code__)
        names |= used
        for name in used:
            method, helper = inspect.getattr_static(own, name, None), function.__globals__.get(name)
            if isinstance(method, staticmethod | classmethod):
                method = method.__func__
            waiting += [inspect.unwrap(method)] if isinstance(method, FunctionType) else []
            waiting += [helper] if getattr(helper, "__module__", None) == function.__module__ else []
    return bool(names & _ATTENTION or (names & _SOFTMAX and names & _MATMUL))


def _names(code: CodeType) -> set[str]:
    """The names that code reads, in functions defined inside it too, and ``@`` where it uses that operator."""
    names = set(code.co_names)
    if any(instruction.argrepr in ("@", "@=") for instruction in dis.get_instructions(code)):
        names.add("@")
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names |= _names(constant)
    return names
