"""Compare the errors of the clips "octav" and "mse" with the lowest error, on tensors of a model and synthetic ones.

    python compare_rules.py --model_name_or_path MODEL --train_file train.json --output_dir runs/rules
    python compare_rules.py --render runs/rules/rules.json

The lowest error is that of the best of 1000 clips, k / 1000 times the largest magnitude. The model, quantized at each
number of bits, runs on one training batch, and the input of every quantizer is measured: weights per row, activations
per tensor. Without a model, only synthetic tensors are measured. The first command writes `rules.json`, and both write
`rules.md` from it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from clip_measurements.measurements import REFERENCE_POINTS, ErrorsOfClips, row_errors
from clip_measurements.tensors import SeenTensor, seen_tensors
from reporting.markdown_table import markdown_table
from reporting.run_environment import environment
from reporting.script_options import fill_in, refuse_given
from squad_task.features import Windows, training_batch
from torch import Tensor
from transformers import AutoConfig, AutoModelForQuestionAnswering, AutoTokenizer, set_seed

from octav_hf import OctavConfig, apply_octav
from octav_hf.functional import CLIP_RULES, mse_sweep_clip
from octav_hf.functional.grid import MAX_BITS, MIN_BITS

RULES = ("octav", "mse")
BITS = range(MIN_BITS, MAX_BITS + 1)
MADE = 10**6  # elements of a synthetic tensor
_ROWS = 64  # rows processed at a time, so that they stay in cache


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measure or read the measurements, write and print the tables, and return the content of `rules.json`."""
    options = parse_arguments(argv)
    if options.render is None:
        record = run(options, sys.argv[1:] if argv is None else argv)
        options.output_dir.mkdir(parents=True, exist_ok=True)
        path = options.output_dir / "rules.json"
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    else:
        path = options.render
        record = json.loads(path.read_text(encoding="utf-8"))
    report = markdown_report(record)
    path.with_suffix(".md").write_text(report, encoding="utf-8")
    print(report)
    return record


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Parse the options; refuse combinations in which an option would be ignored."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("--render", type=Path, help="rules.json from which to write the tables, without measuring")
    parser.add_argument("--output_dir", type=Path, help="where to write")
    parser.add_argument("--model_name_or_path", help="folder or name of a float model; default: synthetic tensors only")
    parser.add_argument("--train_file", help="SQuAD JSON file from which the batch is drawn")
    parser.add_argument("--bits", nargs="+", type=int, choices=BITS, metavar="BITS", help="default: 2 to 8")
    parser.add_argument("--max_samples", type=int, help="windows in the batch; default: 8")
    parser.add_argument("--max_seq_length", type=int, help="tokens of a window; default: 192")
    parser.add_argument("--doc_stride", type=int, help="tokens that neighbouring windows share; default: 64")
    parser.add_argument("--made_elements", type=int, help=f"elements of a synthetic tensor; default: {MADE}")
    parser.add_argument("--seed", type=int, help="default: 0")
    options = parser.parse_args(argv)
    of_model = {"max_samples": 8, "max_seq_length": 192, "doc_stride": 64}
    defaults = {"bits": list(BITS), "made_elements": MADE, "seed": 0, **of_model}
    names = ("output_dir", "model_name_or_path", "train_file", *defaults)
    if options.render is not None:
        refuse_given(parser, options, names, ": --render measures nothing")
        return options
    if options.output_dir is None:
        parser.error("--output_dir missing (or --render RULES_JSON)")
    if (options.model_name_or_path is None) != (options.train_file is None):
        parser.error("--model_name_or_path and --train_file go together")
    if options.model_name_or_path is None:
        refuse_given(parser, options, of_model, " without a model")
    fill_in(parser, options, defaults, counts=("max_samples", "made_elements"))
    return options


def run(options: argparse.Namespace, command: Sequence[str]) -> dict[str, Any]:
    """The content of `rules.json`."""
    about = environment(torch.get_num_threads())
    measured = []
    for bits in sorted(set(options.bits)):
        for seen in (*made_tensors(options.made_elements, options.seed), *model_tensors(options, bits)):
            errors = {rule: error(seen, CLIP_RULES[rule], bits) for rule in RULES}
            lowest = lowest_error(seen, bits)
            measured.append({"bits": bits, "tensor": seen.name, "kind": seen.kind, "mse": {**errors, "lowest": lowest}})
        print(f"{bits} bits done", flush=True)
    model = None if options.model_name_or_path is None else Path(options.model_name_or_path).name
    settings = {"points": REFERENCE_POINTS, "made_elements": options.made_elements, "seed": options.seed}
    return {"model": model, **settings, "command": list(command), "measured": measured, **about}


def model_tensors(options: argparse.Namespace, bits: int) -> list[SeenTensor]:
    """The inputs of the model's quantizers for a training batch, at this number of bits."""
    if options.model_name_or_path is None:
        return []
    set_seed(options.seed)
    tokenizer = AutoTokenizer.from_pretrained(options.model_name_or_path)
    windows = Windows(options.max_seq_length, options.doc_stride, max_query_length=64, pad_to_max_length=False)
    windows.check_model(AutoConfig.from_pretrained(options.model_name_or_path))
    batch = training_batch(options.train_file, tokenizer, windows, options.max_samples, options.seed)
    model = AutoModelForQuestionAnswering.from_pretrained(options.model_name_or_path, dtype=torch.float32).train()
    return seen_tensors(apply_octav(model, OctavConfig(weight_bits=bits, activation_bits=bits)), batch)


def made_tensors(size: int, seed: int) -> Iterator[SeenTensor]:
    """Synthetic tensors of about `size` elements with one clip, each from another distribution."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape or (size,), generator=generator)

    def uniform() -> Tensor:
        return torch.rand(size, generator=generator)

    def softmax(spread: float) -> Tensor:
        return torch.softmax(spread * normal(max(1, size // 384), 384), dim=-1)

    def with_outliers(count: int, value: float) -> Tensor:
        x = normal()
        x[:count] = value
        return x

    centred = uniform() - 0.5
    chi = sum(normal().square() for _ in range(3)) / 3
    made: dict[str, tuple[Tensor, bool]] = {
        "Gaussian": (normal(), True),
        "Laplace": (-centred.sign() * torch.log1p(-2 * centred.abs()), True),
        "Student-t, 3 degrees": (normal() / chi.sqrt(), True),
        "GELU of 1.5 Gaussian": (torch.nn.functional.gelu(1.5 * normal()), True),
        "ReLU, unsigned": (normal().relu(), False),
        "ReLU, signed": (normal().relu(), True),
        "softmax of 2 Gaussian": (softmax(2), False),
        "softmax of 4 Gaussian": (softmax(4), False),
        "softmax of 8 Gaussian": (softmax(8), False),
        "bimodal, ±1 with 0.1": (0.1 * normal() + (uniform() - 0.5).sign(), True),
        "sparse, 5 % Gaussian": (normal() * (uniform() < 0.05), True),
        "20 outliers at 60": (with_outliers(20, 60.0), True),
        "1 outlier at 1000": (with_outliers(1, 1000.0), True),
        "0.1 % at 30 times": (normal() * torch.where(uniform() < 0.001, 30.0, 1.0), True),
        "3 of 1000 channels at 100 times": (_channels(normal(max(1, size // 1000), 1000)), True),
    }
    for name, (values, signed) in made.items():
        yield SeenTensor(name, "made", values, signed, None)


def _channels(x: Tensor) -> Tensor:
    x[:, [3, 500, 998]] *= 100
    return x


def error(seen: SeenTensor, rule: Callable[..., Tensor], bits: int) -> float:
    """Mean squared error of the rule's clips, relative to the squared largest magnitude of a row, summed over rows."""
    return sum(_error(part, rule(part.values, bits, signed=part.signed, dim=part.dim), bits) for part in _parts(seen))


def lowest_error(seen: SeenTensor, bits: int) -> float:
    """The same error for the best clips of the sweep."""
    if seen.dim is None:
        peak = float(seen.values.abs().max() if seen.signed else seen.values.max())
        clips = peak * torch.arange(1, REFERENCE_POINTS + 1, dtype=torch.float64) / REFERENCE_POINTS
        return float(ErrorsOfClips(seen.values, bits, seen.signed)(clips).min())
    sweep = {"signed": seen.signed, "dim": seen.dim, "num_points": REFERENCE_POINTS}
    return sum(_error(part, mse_sweep_clip(part.values, bits, **sweep), bits) for part in _parts(seen))


def _error(part: SeenTensor, clips: Tensor, bits: int) -> float:
    """Mean squared error of a row, summed over rows."""
    if part.dim is None:
        return float(ErrorsOfClips(part.values, bits, part.signed)(clips.reshape(1)))
    return float(row_errors(part.values.double(), clips[:, 0].double(), bits, part.signed).sum())


def _parts(seen: SeenTensor) -> Iterable[SeenTensor]:
    """The tensor itself; a weight in chunks of rows."""
    if seen.dim is None:
        return [seen]
    return [SeenTensor(seen.name, seen.kind, rows, seen.signed, seen.dim) for rows in seen.values.split(_ROWS)]


def markdown_report(record: dict[str, Any]) -> str:
    """Tables of the errors relative to the lowest: the model's tensors by kind, and each synthetic tensor."""
    ratios: dict[tuple[str, int], dict[str, list[float]]] = {}
    for row in record["measured"]:
        group = row["tensor"] if row["kind"] == "made" else f"{row['kind']} (model)"
        found = ratios.setdefault((group, row["bits"]), {rule: [] for rule in RULES})
        for rule in RULES:
            found[rule].append(row["mse"][rule] / row["mse"]["lowest"])
    bits = sorted({width for _, width in ratios})
    header = ["tensor", "clip", *(f"{width} bits" for width in bits)]
    rows = [
        [group, rule, *(_cell(ratios[group, width][rule]) if (group, width) in ratios else "" for width in bits)]
        for group in dict.fromkeys(group for group, _ in ratios)
        for rule in RULES
    ]
    return "\n".join(
        [
            f"Mean squared error over that of the best of {record['points']} clips; of several tensors median / worst.",
            f"Model: {record['model'] or 'none'}. Made tensors: {record['made_elements']} elements.",
            "",
            markdown_table(header, 2, rows),
            "",
        ]
    )


def _cell(ratios: list[float]) -> str:
    if len(ratios) == 1:
        return f"{ratios[0]:.3f}"
    return f"{statistics.median(ratios):.3f} / {max(ratios):.3f}"


if __name__ == "__main__":
    main()
