"""Shared by tests of question-answering models: random training data, and the logits."""

from __future__ import annotations

import torch
from torch import nn


class Spans(torch.utils.data.Dataset):
    """Random token sequences with random answer spans, padded to one length.

    Args:
        count: how many.
        length: tokens of each, the padding included.
        shortest: tokens of the shortest, the padding left out; the spans are within as many.
    """

    def __init__(self, count: int = 12, length: int = 16, shortest: int = 8):
        self.count, self.length, self.shortest = count, length, shortest

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(index)
        ids = torch.randint(0, 100, (self.length,), generator=generator)
        mask = (torch.arange(self.length) < self.shortest + index % (self.length - self.shortest)).long()
        start, end = torch.randint(0, self.shortest, (2,), generator=generator).sort().values
        return {"input_ids": ids, "attention_mask": mask, "start_positions": start, "end_positions": end}


def logits(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Start and end logits, one after the other."""
    with torch.no_grad():
        output = model(**batch)
    return torch.cat([output.start_logits, output.end_logits])
