"""Hiding a quantizer's operations from torch function modes, such as ``AttentionMatmuls``."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch

Function = TypeVar("Function", bound=Callable[..., Any])


def outside_function_modes(function: Function) -> Function:
    """Decorator: function modes do not see what ``function`` calls, and take no matmul in it for the model's."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with torch._C.DisableTorchFunction():
            return function(*args, **kwargs)

    return run  # type: ignore[return-value]
