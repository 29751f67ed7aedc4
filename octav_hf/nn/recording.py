"""Refusing what records a model's operations where a quantizer cannot be recorded."""

import torch
from torch import Tensor, nn


def refuse_recording(quantizer: nn.Module, x: Tensor, dynamic: bool) -> None:
    """Raise unless a quantizer's call on ``x`` is run, compiled, or exported with clips that do not follow the data.

    ``torch.jit.trace`` would record the clip's recursion as it went for this one tensor, and ``torch.fx`` and
    ``torch.export`` stop at it with errors of their own, which do not say what to do.

    Args:
        quantizer: for its ``name`` in the message. Read only there: a compiler would compile once for each name.
        x: what it is called on.
        dynamic: whether its clip is computed from ``x``.

    Raises:
        RuntimeError: the call is being recorded.
    """
    if isinstance(x, torch.fx.Proxy):
        recorder = "torch.fx.symbolic_trace"
    elif torch.jit.is_tracing():
        recorder = "torch.jit.trace"
    elif dynamic and torch.compiler.is_exporting():
        recorder = "torch.export"
    else:
        return
    name = quantizer.name or "FakeQuantize"
    raise RuntimeError(
        f"{name}: {recorder} cannot record a quantizer that computes its clip from the data; call "
        "octav_hf.calibrate_octav(model, batches) and octav_hf.pack_octav(model), then torch.export.export(model, …)"
    )
