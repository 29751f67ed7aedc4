"""Stand-in until branch a is merged."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .._utils.forward_pass import in_evaluation_mode, without_trace
from ..nn import FakeQuantize, QuantizedAttention, QuantizedLayer


@contextmanager
def only(model: nn.Module, quantizers: Iterable[FakeQuantize]) -> Iterator[None]:
    keep = set(quantizers)
    swapped = []
    for module in model.modules():
        if isinstance(module, QuantizedLayer | QuantizedAttention):
            for operand, q in module.operand_quantizers.items():
                if q not in keep:
                    swapped.append((module, f"{operand}_quantizer", q))
    try:
        for module, name, _ in swapped:
            module._modules[name] = nn.Identity()
        yield
    finally:
        for module, name, q in swapped:
            module._modules[name] = q


class Divergence:
    def __init__(self, model: nn.Module, batches: list[Any], teacher: nn.Module | None = None):
        self.model, self.batches = model, batches
        if teacher is not None:
            self.targets = [self._logits(teacher, b) for b in batches]
        else:
            with only(model, []):
                self.targets = [self._logits(model, b) for b in batches]

    def _logits(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        with in_evaluation_mode(model), without_trace(model) as runnable:
            out = runnable(**batch)
        return {
            n: v.double().masked_fill(batch["attention_mask"] == 0, -1e9).log_softmax(-1)
            for n, v in out.items()
            if n.endswith("_logits")
        }

    def of_model(self) -> float:
        total, n = 0.0, 0
        for batch, target in zip(self.batches, self.targets):
            for name, x in self._logits(self.model, batch).items():
                d = torch.nn.functional.kl_div(x, target[name], log_target=True, reduction="none").sum(-1)
                total += float(d.sum())
                n += d.numel()
        return total / n
