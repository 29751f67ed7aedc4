"""Whether compiled code may serve a tensor, and the one warning where it cannot be had."""

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
    """Whether compiled code may serve ``x``: a plain tensor of a dtype and on a device that it knows."""
    return (
        not _failed
        and os.environ.get(SWITCH) != "0"
        and x.dtype in _DTYPES
        and x.device.type in device_types
        and type(x) in (Tensor, torch.nn.Parameter)
        and not torch.compiler.is_compiling()  # the caller's compiler fuses the plain function into its own graph
        and not torch.jit.is_tracing()
        and current_dispatch_mode() is None  # what counts or records operations wants to see them
    )


def disable_kernels(error: Exception) -> None:
    """Do without compiled code from now on, and say so once."""
    global _failed
    if _failed:
        return
    _failed = True
    first_line = str(error).partition("\n")[0]
    warnings.warn(
        "octav_hf runs without compiled kernels, which is slower but gives the same results (with the clip rule mse, "
        f"nearly the same): compiling failed with {type(error).__name__}: {first_line} "
        f"A C++ compiler (g++) is what it needs on a CPU; {SWITCH}=0 in the environment "
        "switches it off without this warning.",
        stacklevel=3,
    )


def kernels_disabled() -> bool:
    """Whether compilation has failed in this process."""
    return _failed
