"""The error raised when a quantizer is traced."""

import torch
from torch import Tensor, nn


def refuse_recording(quantizer: nn.Module, x: Tensor, dynamic: bool) -> None:
    """Raise ``RuntimeError`` if ``quantizer(x)`` is being traced, except by ``torch.export`` with frozen clips.

    ``torch.jit.trace`` would record the clip of this tensor as a constant; ``torch.fx`` and ``torch.export`` would fail
    with errors that do not tell what to do.
    """
    if isinstance(x, torch.fx.Proxy):
        recorder = "torch.fx.symbolic_trace"
    elif torch.jit.is_tracing():
        recorder = "torch.jit.trace"
    elif dynamic and torch.compiler.is_exporting():
        recorder = "torch.export"
    else:
        return
    name = str(quantizer.name or "FakeQuantize")  # read late, or a compiler would recompile for each name
    module, _, operand = name.rpartition(" ")
    shared = f" (a shared weight or an embedding: exclude_modules=[{module!r}] in the config)"
    raise RuntimeError(
        f"{name}: {recorder} cannot record a quantizer that computes its clip from the data; call "
        f"octav_hf.calibrate_octav(model, batches, weights=True){shared if operand == 'weight' else ''}, then "
        "torch.export.export(model, …), or for ONNX torch.onnx.export(model, …, dynamo=True)"
    )
