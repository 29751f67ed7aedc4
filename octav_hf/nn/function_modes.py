"""Running what belongs to a quantizer out of sight of torch function modes, such as attention's."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

from .._utils.torch_private import without_function_modes

Function = TypeVar("Function", bound=Callable[..., Any])


def outside_function_modes(function: Function) -> Function:
    """Decorator: no function mode sees what ``function`` calls, so that its products are not taken for the model's."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with without_function_modes():
            return function(*args, **kwargs)

    return run  # type: ignore[return-value]
