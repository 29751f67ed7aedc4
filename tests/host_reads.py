"""The host cost of a training step: dispatched operations, and synchronizing reads.

    python -m tests.host_reads                              # MiniLM's shape, the paper's recipe and the accurate one

Counted on the CPU without compiled code, where the operations are those that a GPU would be sent.
"""

from __future__ import annotations

import argparse
import os
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import BertConfig, BertForQuestionAnswering

from octav_hf import OctavConfig, apply_octav

MINILM = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
RECIPES = {"float": None, "paper": OctavConfig.paper(), "accurate": OctavConfig.accurate()}

aten = torch.ops.aten
# Operations whose result, or the shape of it, the host has to know.
_READS = {
    aten._local_scalar_dense,  # what is left of item(), bool() and float(), which modes in modes see whole
    aten.item,
    aten.is_nonzero,
    aten.equal,
    aten.nonzero,
    aten.masked_select,
    aten.bincount,
    aten._unique2,
    aten.unique_dim,
    aten.unique_consecutive,
}
_INDEXING = {aten.index, aten.index_put, aten.index_put_}  # which read where a mask is true
_COPIES = {aten._to_copy, aten.copy_}
_ROOT = Path(__file__).parent.parent


class HostReads(TorchDispatchMode):
    """Counts the operations of a block, and its host reads by the line that asked for them.

    Copies between the CPU and another device count as reads: unless memory is pinned, the host waits for them.

    Args:
        device: type of the device whose tensors are read.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device
        self.operations, self.reads = 0, Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.operations += 1
        indices = tree_leaves(args[1]) if func.overloadpacket in _INDEXING else []
        masked = any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in indices)
        if (func.overloadpacket in _READS or masked) and args[0].device.type == self.device:
            self._count(func)
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in _COPIES:
            tensors = [x for x in tree_leaves((args, result)) if isinstance(x, torch.Tensor)]
            if len({x.device.type for x in tensors}) > 1:
                self._count(func)
        return result

    def _count(self, func: Any) -> None:
        self.reads[f"{func} at {_asking_line()}"] += 1


def _asking_line() -> str:
    """The innermost line that is neither in PyTorch nor in this file."""
    # A mode only passes on what was asked for further out.
    modes = ("__torch_function__", "__torch_dispatch__")
    frames = [frame for frame in traceback.extract_stack() if frame.name not in modes]
    frame = [f for f in frames if "site-packages/torch/" not in f.filename and f.filename != __file__][-1]
    path = frame.filename.split("site-packages/")[-1].removeprefix(f"{_ROOT}/")
    return f"{path}:{frame.lineno}: {frame.line}"


def make_bert(settings: OctavConfig | None, attention: str = "sdpa", **sizes: int) -> nn.Module:
    """A random BERT in training mode, quantized if there are settings."""
    config = BertConfig(**sizes)
    config._attn_implementation = attention
    torch.manual_seed(0)
    model = BertForQuestionAnswering(config).train()
    return model if settings is None else apply_octav(model, settings)


def padded_batch(batch: int, length: int) -> dict[str, torch.Tensor]:
    """Token ids, the last sequence padded to twice its length, and answers."""
    mask = torch.ones(batch, length, dtype=torch.long)
    mask.select(0, batch - 1).narrow(0, length // 2, length // 2).zero_()
    positions = torch.zeros(batch, dtype=torch.long)
    ids = torch.randint(1, 1000, (batch, length))
    return {"input_ids": ids, "attention_mask": mask, "start_positions": positions, "end_positions": positions}


def count_step(recipe: str, attention: str, size: tuple[int, int]) -> HostReads:
    """Counts of the second training step (forward, backward, fused AdamW) of a model of MiniLM's shape on the CPU."""
    model = make_bert(RECIPES[recipe], attention, **MINILM)
    batch = padded_batch(*size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    for _ in range(2):  # the first makes the optimizer's state
        with HostReads("cpu") as counts:
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return counts


def main(argv: list[str] | None = None) -> None:
    """Print a table, and where the reads are."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--length", type=int, default=384)
    parser.add_argument("--attention", choices=["eager", "sdpa"], default="sdpa")
    options = parser.parse_args(argv)
    os.environ["OCTAV_HF_COMPILE"] = "0"
    counts = {recipe: count_step(recipe, options.attention, (options.batch_size, options.length)) for recipe in RECIPES}
    print("| model | dispatched operations | host reads |")
    print("|---|---:|---:|")
    for recipe, count in counts.items():
        print(f"| {recipe} | {count.operations:,} | {count.reads.total()} |")
    for recipe, count in counts.items():
        for place, number in count.reads.most_common():
            print(f"{recipe}: {number} x {place}")


if __name__ == "__main__":
    main()
