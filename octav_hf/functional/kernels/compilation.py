"""When compiled kernels are used, and the warning if compilation fails."""

import os
import warnings

import torch
from torch import Tensor

from ..._utils.torch_private import current_dispatch_mode

SWITCH = "OCTAV_HF_COMPILE"
"""Environment variable: ``0`` switches compilation off."""

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_failed = False


def can_compile(x: Tensor, device_types: tuple[str, ...]) -> bool:
    """Whether compiled kernels can be used for ``x``: a plain tensor of a supported dtype and device."""
    return (
        not kernels_disabled()
        and x.dtype in _DTYPES
        and x.device.type in device_types
        and type(x) in (Tensor, torch.nn.Parameter)
        and not torch.compiler.is_compiling()  # the caller's graph fuses the plain function
        and not torch.jit.is_tracing()
        and current_dispatch_mode() is None  # dispatch modes must see the operations
    )


def disable_kernels(error: Exception) -> None:
    """Stop using compiled kernels in this process, with one warning."""
    global _failed
    if _failed:
        return
    _failed = True
    first_line = str(error).partition("\n")[0]
    warnings.warn(
        "octav_hf runs without compiled kernels, because compilation failed with "
        f"{type(error).__name__}: {first_line} "
        "This is slower; the results are the same (for the clip rule mse, nearly the same). On a CPU, install a C++ "
        f"compiler (g++); or set {SWITCH}=0 in the environment to switch compilation off without this warning.",
        stacklevel=3,
    )


def kernels_disabled() -> bool:
    """Whether compilation is switched off or has failed in this process."""
    return _failed or os.environ.get(SWITCH) == "0"
