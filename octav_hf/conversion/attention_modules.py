"""Find the modules that compute attention, by the config's patterns or by their class."""

import functools
import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from .._utils.name_patterns import NamePatterns
from ..nn import QuantizedAttention


def attention_modules(modules: Mapping[str, nn.Module], patterns: Iterable[str] | None = None) -> dict[str, nn.Module]:
    """The subset of ``modules`` that computes attention.

    Args:
        modules: full name -> module, for all modules of a model.
        patterns: ``OctavConfig.attention_modules``. ``None``: modules whose forward calls Transformers' attention
            interface, and modules with submodules whose class, or a base class, has ``Attention`` in its name; of
            nested ones, the innermost.
    """
    if patterns is not None:
        named = NamePatterns(patterns, alone=True)
        return {name: module for name, module in modules.items() if named.matching(name)}
    classes = {name: _own_class(module) for name, module in modules.items()}
    calling = {name for name, cls in classes.items() if _calls_attention_interface(cls)}
    called = {name for name, cls in classes.items() if _is_called_attention(cls) and list(modules[name].children())}
    # A helper inside an attention module may have Attention in its class name too.
    found = calling | {name for name in called if calling.isdisjoint(_ancestors(name))}
    containers = {ancestor for name in found for ancestor in _ancestors(name)}
    return {name: module for name, module in modules.items() if name in found - containers}


def _ancestors(name: str) -> list[str]:
    """The full names of the modules that contain this one."""
    parts = name.split(".") if name else []
    return [".".join(parts[:end]) for end in range(len(parts))]


def _own_class(module: nn.Module) -> Any:
    """The module's class before conversion."""
    return type(module).__bases__[1] if isinstance(module, QuantizedAttention) else type(module)


@functools.cache
def _is_called_attention(cls: Any) -> bool:
    return any("Attention" in base.__name__ for base in cls.__mro__)


@functools.cache
def _calls_attention_interface(cls: Any) -> bool:
    code = getattr(inspect.unwrap(cls.forward), "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names
