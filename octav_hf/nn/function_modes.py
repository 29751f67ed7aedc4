"""Hide a quantizer's operations from torch function modes such as ``AttentionMatmuls``."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

from .._utils.torch_private import without_function_modes

Function = TypeVar("Function", bound=Callable[..., Any])


def outside_function_modes(function: Function) -> Function:
    """Decorator: hide what ``function`` calls from function modes, which would take its matmuls for the model's."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with without_function_modes():
            return function(*args, **kwargs)

    return run  # type: ignore[return-value]
