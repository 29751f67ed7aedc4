"""Compare `octav_hf.suggest_bits` with one width for all modules, at equal bytes of the weights and equal operations.

    python compare_bits.py --model_name_or_path runs/float --train_file data/train.json --validation_file data/choices.json \
        --output_dir runs/bits --seeds 0 1 2

Each cell trains the same float model by `run_squad.py` with the clips and grids of `OctavConfig.accurate()`. Of the unit "bytes"
weights alone are quantized, of "operations" activations too. The widths come from training batches. Each finished cell
is a line of `results.jsonl`; started again, the script goes on with the cells that are missing. Arguments that it does
not know go to `run_squad.py`.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # before an installed octav_hf of another version

import run_squad
from reporting.run_environment import environment
from squad_study.record import Line, append_line, read_lines
from squad_task.dataset import sample
from squad_task.features import training_features
from study import RECIPE
from transformers import AutoModelForQuestionAnswering, AutoTokenizer, DataCollatorWithPadding

import octav_hf

FORMS = ("uniform", "suggested")
RECIPE_FROM_FLOAT = RECIPE | {"num_train_epochs": "1", "learning_rate": "1e-4"}  # as for real questions in README.md


def main(argv: list[str] | None = None) -> list[Line]:
    """Run what is missing, print the table, and return the lines of the results file."""
    options, passed_on = parse_arguments(argv)
    results = options.output_dir / "results.jsonl"
    finished = {line["cell"] for line in read_lines(results)}
    for seed, unit, bits, form in itertools.product(options.seeds, options.units, options.bits, FORMS):
        name = f"{unit}-{bits}-{form}-seed{seed}"
        if name not in finished:
            line = run_cell(options, passed_on, name, unit, bits, form, seed)
            append_line(results, line)
            print(f"== {name}: F1 {line['metrics']['eval_f1']:.2f}, {line['seconds']:.0f} s", flush=True)
    lines = read_lines(results)
    print(table(lines))
    return lines


def parse_arguments(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """This script's own options, and the arguments to hand on."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--units", nargs="+", choices=["bytes", "operations"], default=["bytes", "operations"])
    parser.add_argument("--bits", nargs="+", type=int, default=[4, 3], help="of the uniform models")
    parser.add_argument("--batches", type=int, default=4, help="training batches that the widths come from")
    return parser.parse_known_args(argv)


def run_cell(
    options: argparse.Namespace, passed_on: list[str], name: str, unit: str, bits: int, form: str, seed: int
) -> Line:
    """Train and score one model."""
    begin = time.perf_counter()
    given = {argument.split("=")[0] for argument in passed_on}
    recipe = [word for key, value in RECIPE_FROM_FLOAT.items() if f"--{key}" not in given for word in (f"--{key}", value)]
    config = octav_hf.OctavConfig.accurate(weight_bits=bits, activation_bits=bits if unit == "operations" else None)
    arguments = [*recipe, *passed_on, "--seed", str(seed), "--do_train", "--do_eval", *quantization(config)]
    arguments += ["--output_dir", str(options.output_dir / name)]
    suggestion: dict[str, Any] = {}
    if form == "suggested":
        suggested = suggest(arguments, config, options.batches, bits, unit)
        print(suggested, flush=True)
        arguments += ["--module_overrides", json.dumps(suggested)]
        suggestion = {
            "cost": suggested.cost,
            "budget": suggested.budget,
            "divergence": suggested.divergence,
            "divergence_uniform": suggested.divergence_before,
            "bits": {f"{module} {field}": number for (module, field), number in suggested.chosen.items()},
        }
    metrics = run_squad.main(arguments)
    cell = {"cell": name, "unit": unit, "bits": bits, "form": form, "seed": seed}
    seconds = time.perf_counter() - begin
    return {**cell, "metrics": metrics, "suggestion": suggestion, "seconds": seconds, "arguments": arguments, **environment("1", 1)}


def quantization(config: octav_hf.OctavConfig) -> list[str]:
    """The arguments of `run_squad.py` for the fields in which `config` differs from the default."""
    words = ["--quantize", "true"]
    for field in dataclasses.fields(octav_hf.OctavConfig):
        value = getattr(config, field.name) if field.init else None
        if field.init and value != getattr(octav_hf.OctavConfig(), field.name):
            text = "none" if value is None else json.dumps(value) if isinstance(value, dict) else str(value).lower()
            words += [f"--{field.name}", text]
    return words


def suggest(
    arguments: list[str], config: octav_hf.OctavConfig, count: int, budget: int, unit: str
) -> octav_hf.analysis.bit_allocation.BitSuggestion:
    """The widths for the model that training starts from, by `count` batches of its training questions."""
    model_args, data_args, _, _, training_args = run_squad.parse_arguments(arguments)
    tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path)
    questions = sample(data_args.load("train"), data_args.max_train_samples, training_args.seed)
    parts = {
        "args": training_args,
        "train_dataset": training_features(questions, tokenizer, data_args.windows()),
        "data_collator": DataCollatorWithPadding(tokenizer),
    }
    model = AutoModelForQuestionAnswering.from_pretrained(model_args.model_name_or_path)
    octav_hf.apply_octav(model, config)
    return octav_hf.suggest_bits(model, run_squad.random_batches(parts, count), budget=budget, unit=unit)


def table(lines: list[Line]) -> str:
    """F1 of each seed, and the mean, in Markdown; a column for each form."""
    rows = ["| equal | bits | seed | uniform F1 | suggested F1 | difference |", "|---|---:|---|---:|---:|---:|"]
    f1 = {(line["unit"], line["bits"], line["seed"], line["form"]): line["metrics"]["eval_f1"] for line in lines}
    for unit, bits in dict.fromkeys((unit, bits) for unit, bits, _, _ in f1):
        seeds = [seed for seed in sorted({key[2] for key in f1}) if all((unit, bits, seed, form) in f1 for form in FORMS)]
        pairs = [[f1[unit, bits, seed, form] for form in FORMS] for seed in seeds]
        named = [*zip(seeds, pairs, strict=True), *([("mean", [statistics.mean(x) for x in zip(*pairs, strict=True)])] if pairs else [])]
        rows += [f"| {unit} | {bits} | {seed} | {uniform:.2f} | {mixed:.2f} | {mixed - uniform:+.2f} |" for seed, (uniform, mixed) in named]
    return "\n".join(rows)


if __name__ == "__main__":
    main()
