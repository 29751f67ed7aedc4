"""Table 1 of the paper at small scale: image classifiers trained from scratch in FP32, with max-scaling, and with OCTAV
and each gradient estimator, at 4 bits with 8 bits in the first and the last layer.

    python digits_study.py
    python digits_study.py --models resnet --methods fp32 mph --seeds 0 1 2 3 4
    python digits_study.py --methods fp32 --learning_rate 3e-3 --part held_out   # how the recipe was chosen

All runs of one seed start from the same weights and see the images in the same order.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # before an installed octav_hf of another version

import numpy as np
import torch
from digits_data import Digits, digits
from digits_models import MODELS
from digits_table import markdown_table
from transformers import EvalPrediction, PrinterCallback, Trainer, TrainingArguments, set_seed

import octav_hf

# Settings in which the methods differ; None: not quantized.
METHODS: dict[str, dict[str, Any] | None] = {
    "fp32": None,
    "max": {"weight_clip": "max", "activation_clip": "max"},
    "ste": {"weight_gradient_estimator": "ste", "activation_gradient_estimator": "ste"},
    "pwl": {"weight_gradient_estimator": "pwl", "activation_gradient_estimator": "pwl"},
    "mad": {"weight_gradient_estimator": "mad", "activation_gradient_estimator": "mad"},
    "mph": {"weight_gradient_estimator": "mad", "activation_gradient_estimator": "pwl"},
}
# Appendix E.2: 8 bits in the first and the last layer, one clip for the weight of a linear layer.
CONFIG: dict[str, Any] = {
    "first_last_bits": 8,
    "module_overrides": {"classifier": {"weight_granularity": "tensor"}},
}
# chosen with FP32 on the held-out images
RECIPE: dict[str, Any] = {
    "num_train_epochs": 20,
    "per_device_train_batch_size": 64,
    "per_device_eval_batch_size": 256,
    "learning_rate": 1e-3,
    "weight_decay": 0.01,
    "warmup_steps": 0.1,
    "lr_scheduler_type": "cosine",
}
PACKAGES = ("torch", "transformers", "scikit-learn", "numpy")


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    """Train and evaluate all requested runs, print the table, and return one row per run.

    `results.json` in `--output_dir` is rewritten after every run, `results.md` at the end.
    """
    options = parse_arguments(argv)
    recipe = RECIPE | {"num_train_epochs": options.epochs, "learning_rate": options.learning_rate}
    data = digits()
    options.output_dir.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {
        "rows": [],
        "options": {name: value for name, value in vars(options).items() if name != "output_dir"},
        "recipe": recipe,
        "methods": METHODS,
        "config": CONFIG,
        "versions": {
            "python": platform.python_version(),
            "octav_hf": octav_hf.__version__,
            **{package: importlib.metadata.version(package) for package in PACKAGES},
        },
        "hardware": {"machine": platform.machine(), "cpus": os.cpu_count(), "threads": torch.get_num_threads()},
    }
    for seed in options.seeds:
        for model in options.models:
            for method in options.methods:
                row = {"model": model, "method": method, "seed": seed}
                row |= run(model, method, seed, options.bits, recipe, data, options.part, options.output_dir)
                print(row, flush=True)
                record["rows"].append(row)
                (options.output_dir / "results.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    table = markdown_table(record["rows"])
    (options.output_dir / "results.md").write_text(table + "\n", encoding="utf-8")
    print(table)
    return record["rows"]


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The options of a study."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--bits", type=int, default=4, help="bits of weights and activations")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=RECIPE["num_train_epochs"])
    parser.add_argument("--learning_rate", type=float, default=RECIPE["learning_rate"])
    parser.add_argument(
        "--part",
        choices=["test", "held_out"],
        default="test",
        help="images to score; held_out, for choosing a recipe, are train images that are then left out of training",
    )
    parser.add_argument("--output_dir", type=Path, default=Path("digits_study"))
    return parser.parse_args(argv)


def run(
    model_name: str,
    method: str,
    seed: int,
    bits: int,
    recipe: dict[str, Any],
    data: Digits,
    part: str,
    output_dir: Path,
) -> dict[str, float]:
    """Train one model and return `accuracy` (percent), `train_loss` (mean of the last epoch) and `seconds`."""
    set_seed(seed)
    model = MODELS[model_name]()
    difference = METHODS[method]
    if difference is not None:
        octav_hf.apply_octav(
            model, octav_hf.OctavConfig(weight_bits=bits, activation_bits=bits, **CONFIG, **difference)
        )
    arguments = TrainingArguments(
        output_dir=str(output_dir / "trainer"),
        seed=seed,
        save_strategy="no",
        logging_strategy="epoch",
        report_to=[],
        disable_tqdm=True,
        **recipe,
    )
    fit, score = (data.train, data.test) if part == "test" else (data.fit, data.held_out)
    trainer = Trainer(model, arguments, train_dataset=fit, eval_dataset=score, compute_metrics=accuracy)
    trainer.remove_callback(PrinterCallback)
    begin = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - begin
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {
        "accuracy": trainer.evaluate()["eval_accuracy"],
        "train_loss": losses[-1],
        "seconds": round(seconds, 1),
    }


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Percentage of images whose largest logit is at their label."""
    right = np.asarray(prediction.predictions).argmax(axis=-1) == prediction.label_ids
    return {"accuracy": 100 * float(right.mean())}


if __name__ == "__main__":
    main()
