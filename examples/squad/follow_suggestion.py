"""Train at 4 bits, follow the first of `octav_hf`'s suggestions, and compare both on held-out training questions.

    python hold_out.py --train_file data/train.json --questions 336 --output_dir runs/held_out
    python follow_suggestion.py --data runs/held_out --output_dir runs/suggestion --seeds 0 1 2 --num_train_epochs 2

Two epochs of three quarters of the questions are as many steps as the demo has; further arguments go to `run_squad.py`.
For each seed MiniLM is trained by the recipe of `make demo` and the config `OctavConfig()`; the suggestions come from
batches of its training questions, and it is trained once more, from the same pretrained weights, with the config that
the first suggestion's code makes. Neither the held-out questions nor the dev set choose anything. Each finished seed is
a line of `results.jsonl`; started again, the script goes on with the seeds that are missing.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # before an installed octav_hf of another version

import run_squad
import torch
from compare_bits import quantization
from reporting.run_environment import environment
from squad_study.record import Line, append_line, read_lines
from squad_task.dataset import sample
from squad_task.features import training_features
from study import RECIPE, minilm_folder
from transformers import AutoModelForQuestionAnswering, AutoTokenizer, DataCollatorWithPadding

import octav_hf
from octav_hf.analysis.divergence import FloatOutputs
from octav_hf.analysis.operand_statistics import operand_statistics
from octav_hf.analysis.sensitivity import sensitivity
from octav_hf.analysis.suggestions import suggestions

WORST = 8  # operands that a line names


def main(argv: list[str] | None = None) -> list[Line]:
    """Run what is missing, print the table, and return the lines of the results file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("--data", type=Path, required=True, help="folder with the two files of hold_out.py")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--batches", type=int, default=2, help="training batches of 16 that suggestions come from")
    options, passed_on = parser.parse_known_args(argv)
    results = options.output_dir / "results.jsonl"
    for seed in options.seeds:
        if seed not in {line["seed"] for line in read_lines(results)}:
            append_line(results, run_seed(options, passed_on, seed))
    lines = read_lines(results)
    print(table(lines))
    return lines


def run_seed(options: argparse.Namespace, passed_on: list[str], seed: int) -> Line:
    """Train by the paper's recipe and by the first suggestion."""
    recipe = [word for name, value in RECIPE.items() for word in (f"--{name}", value)]
    files = ["--train_file", str(options.data / "train.json"), "--validation_file", str(options.data / "choices.json")]
    shared = ["--model_name_or_path", minilm_folder(), *files, *recipe, "--seed", str(seed), *passed_on]

    def trained(name: str, config: octav_hf.OctavConfig) -> tuple[Path, dict[str, Any]]:
        folder = options.output_dir / f"{name}-seed{seed}"
        metrics = folder / "all_results.json"
        if not metrics.is_file():
            run_squad.main([*shared, "--do_train", "--do_eval", "--output_dir", str(folder), *quantization(config)])
        return folder, json.loads(metrics.read_text(encoding="utf-8"))

    folder, before = trained("paper", octav_hf.OctavConfig())
    model = AutoModelForQuestionAnswering.from_pretrained(folder)
    batches = training_batches(folder, [*shared, "--do_train", "--output_dir", str(folder)], options.batches)
    statistics_of_worst = sorted(operand_statistics(model, batches), key=lambda each: each.sqnr_db or 0)[:WORST]
    outputs = FloatOutputs(model, batches)
    found = suggestions(model, outputs, sensitivity(model, outputs))
    names: dict[str, Any] = {"model": AutoModelForQuestionAnswering.from_pretrained(minilm_folder())}
    exec(found[0].code, names)
    _, after = trained("suggested", names["config"])
    return {
        "seed": seed,
        "f1": [before["eval_f1"], after["eval_f1"]],
        "exact_match": [before["eval_exact_match"], after["eval_exact_match"]],
        "suggestions": [dataclasses.asdict(each) for each in found],
        "worst": [[f"{each.module} {each.operand}", each.sqnr_db] for each in statistics_of_worst],
        "arguments": shared,
        **environment(torch.get_num_threads()),
    }


def training_batches(folder: Path, arguments: list[str], count: int) -> list[Any]:
    """Random batches of the training questions, without their answers."""
    _, data_args, _, _, training_args = run_squad.parse_arguments(arguments)
    training_args.per_device_train_batch_size = 16
    tokenizer = AutoTokenizer.from_pretrained(folder)
    questions = sample(data_args.load("train"), data_args.max_train_samples, training_args.seed)
    parts = {
        "args": training_args,
        "train_dataset": training_features(questions, tokenizer, data_args.windows()),
        "data_collator": DataCollatorWithPadding(tokenizer),
    }
    batches = run_squad.random_batches(parts, count)
    return [{name: x for name, x in batch.items() if not name.endswith("positions")} for batch in batches]


def table(lines: list[Line]) -> str:
    """F1 of each seed and the mean, in Markdown."""
    rows = ["| seed | paper's recipe | first suggestion | difference | which |", "|---|---:|---:|---:|---|"]
    named = [(str(line["seed"]), line["f1"], line["suggestions"][0]["title"]) for line in lines]
    named.append(("mean", [statistics.mean(line["f1"][index] for line in lines) for index in range(2)], ""))
    rows += [f"| {name} | {a:.2f} | {b:.2f} | {b - a:+.2f} | {title} |" for name, (a, b), title in named]
    return "\n".join(rows)


if __name__ == "__main__":
    main()
