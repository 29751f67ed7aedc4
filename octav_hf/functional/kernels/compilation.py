"""Whether compiled kernels can be used for a tensor, and the warning if compilation fails."""

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
        and not torch.compiler.is_compiling()  # the plain function is fused into the caller's graph
        and not torch.jit.is_tracing()
        and current_dispatch_mode() is None  # modes that count or record operations must see them
    )


def disable_kernels(error: Exception) -> None:
    """Stop using compiled kernels in this process, with one warning."""
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
    """Whether compilation has failed in this process, or is switched off."""
    return _failed or os.environ.get(SWITCH) == "0"
