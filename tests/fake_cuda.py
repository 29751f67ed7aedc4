"""Training steps on fake CUDA tensors, which have no values, so that reading one raises.

    python -m tests.fake_cuda [library of fake_cuda.cpp]    # a JSON object, case -> error, empty if there is none

PyTorch without CUDA needs the library, and needs it first: hence a process of its own.
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

if len(sys.argv) > 1:
    ctypes.CDLL(sys.argv[1])

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from octav_hf import OctavConfig, distill
from tests.host_reads import MINILM, RECIPES, HostReads, make_bert, padded_batch

SIZES = {**MINILM, "num_hidden_layers": 1}
LENGTHS = (4, 64)  # whose tensors are small, and large enough for a table
OTHER_SETTINGS = {
    "max": OctavConfig(weight_clip="max", activation_clip="max", weight_granularity="tensor"),
    "percentile": OctavConfig(weight_clip="percentile", activation_clip="percentile", embedding_bits=8),
    "ten updates": OctavConfig(activation_clip_options={"max_iterations": 10}, asymmetric_activations=True),
}
OPERANDS = ("input", "query", "key", "probabilities", "value")
GROUPS = OctavConfig.accurate(weight_granularity="group", activation_granularity=dict.fromkeys(OPERANDS, "group"))


def main() -> None:
    """Run every case, and print what went wrong."""
    print(json.dumps(dict(results())))


def results() -> Iterator[tuple[str, str]]:
    for recipe, settings in RECIPES.items():
        for length in LENGTHS:
            yield f"{recipe} eager {length}", error_of_a_step(settings, length, attention="eager")
            yield f"{recipe} sdpa {length}", error_of_a_step(settings, length)
            yield f"{recipe} sdpa {length}, without kernels", error_of_a_step(settings, length, without_kernels=True)
        yield f"{recipe} bfloat16", error_of_a_step(settings, dtype=torch.bfloat16)
        yield f"{recipe} distilled", error_of_a_step(settings, distilled=True)
        if settings is not None:
            together = replace(settings, sync_activation_clips=True)
            yield f"{recipe} synchronized", error_of_a_step(together)
    for name, settings in OTHER_SETTINGS.items():
        yield f"{name}, without kernels", error_of_a_step(settings, without_kernels=True)
    for length in (*LENGTHS, 70):
        yield f"groups, {length}", error_of_a_step(GROUPS, length)


class References(TorchDispatchMode):
    """Context without kernels, as on a GPU without Triton."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if not hasattr(func, "reference"):
            return func(*args, **(kwargs or {}))
        with self:
            return func.reference(*args, **(kwargs or {}))


def error_of_a_step(
    settings: OctavConfig | None,
    length: int = LENGTHS[-1],
    *,
    attention: str = "sdpa",
    dtype: torch.dtype = torch.float32,
    distilled: bool = False,
    without_kernels: bool = False,
) -> str:
    """The first read of two training steps (forward, backward, AdamW), as a line of code; empty if there is none."""
    model = make_bert(settings, attention, **SIZES).to(dtype)
    if distilled:
        teacher = make_bert(None, attention, **SIZES).to(dtype)
        distill(model, teacher, weight=0.5)
    reads = HostReads("cuda")
    try:
        with FakeTensorMode():
            on_fake_cuda(model)
            if distilled:
                on_fake_cuda(teacher)
            batch = {name: without_values(x) for name, x in padded_batch(2, length).items()}
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
            with reads, References() if without_kernels else nullcontext():
                for _ in range(2):
                    model(**batch).loss.backward()
                    optimizer.step()
                    optimizer.zero_grad()
    except Exception as error:
        return f"{', '.join(reads.reads)} {type(error).__name__}: {error}"
    return ", ".join(reads.reads)


def on_fake_cuda(model: nn.Module) -> None:
    """Replace parameters and buffers; `to` cannot make a fake tensor of a real one."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(without_values(parameter))
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = without_values(buffer)


def without_values(x: torch.Tensor) -> torch.Tensor:
    """A CUDA tensor like `x`; inside FakeTensorMode it is a fake one."""
    return torch.empty(x.shape, dtype=x.dtype, device="cuda")


if __name__ == "__main__":
    main()
