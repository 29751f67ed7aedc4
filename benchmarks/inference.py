"""Time, peak memory and file size of a question-answering model in float and with integer arithmetic.

    python benchmarks/inference.py --output inference.json        # MiniLM and BERT-Base's shape, 1 and 2 threads
    python benchmarks/inference.py --models MiniLM --sizes 8x128 --threads 2 --rounds 21

Every round runs each form once, and medians are compared with PyTorch in FP32. Peak memory is measured in a separate
process, which loads the form's files and runs it three times. A form whose packages are not installed is left out. With
`--answers` (a file written by `examples/squad/compare_answers.py`), the table also has the F1 of the fine-tuned MiniLM.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import statistics
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from inference_forms import BASELINE, FILES, FORMS, has_vnni, random_batch
from peers import installed
from size import MODELS
from step import resident_memory, seconds
from transformers import logging

PACKAGES = ("torch", "transformers", "onnxruntime", "openvino", "octav-hf")
MEMORY_SIZE, MEMORY_THREADS = (8, 128), 1


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measure, print the tables, and return what was measured."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--forms", nargs="+", choices=list(FORMS), default=list(FORMS))
    parser.add_argument("--sizes", nargs="+", default=["1x128", "8x128", "1x384"], help="batch x tokens")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--answers", type=Path, help="record that has F1")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    parser.add_argument("--peak_memory_of", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    logging.set_verbosity_error()
    if options.peak_memory_of:
        form, folder = options.peak_memory_of
        print(peak_memory(form, Path(folder)))
        return {}
    forms = [name for name in options.forms if is_installed(name)]
    answers = json.loads(options.answers.read_text())["rows"] if options.answers else []
    rows = [row for name in options.models for row in measure(name, forms, options)]
    for row in rows if answers else []:
        found = [a for a in answers if (a["run"], a["form"]) == FORMS[row["form"]].answers and row["model"] == "MiniLM"]
        row["f1"] = found[0]["f1"] if found else None
    result = {
        "processor": processor(),
        "versions": {package: installed(package) for package in PACKAGES},
        "rounds": options.rounds,
        "rows": rows,
    }
    print(f"{result['processor']}; medians of {options.rounds} rounds; times / {BASELINE}")
    print(table(rows))
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


def is_installed(name: str) -> bool:
    """Whether the packages of a form are installed; prints a line if not."""
    missing = [package for package in FORMS[name].packages if importlib.util.find_spec(package) is None]
    if missing:
        print(f"{name}: left out, {', '.join(missing)} not installed")
    return not missing


def measure(model: str, forms: list[str], options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row per form: bytes on disk, peak memory, and seconds for each number of threads and size."""
    with tempfile.TemporaryDirectory() as temporary:
        folders = {}
        for files in dict.fromkeys(FORMS[form].files for form in forms):
            folders[files] = Path(temporary) / files
            folders[files].mkdir()
            FILES[files](MODELS[model](), folders[files])
        folder = {form: folders[FORMS[form].files] for form in forms}
        rows: dict[str, dict[str, Any]] = {
            form: {
                "model": model,
                "form": form,
                "file_bytes": bytes_of_weights(folder[form]),
                "peak_memory_bytes": measured_in_a_process(form, folder[form]),
                "seconds": {},
            }
            for form in forms
        }
        for threads in options.threads:
            torch.set_num_threads(threads)
            loaded = {form: FORMS[form].load(folder[form], threads) for form in forms}
            for size in options.sizes:
                batch = random_batch(tuple(map(int, size.split("x"))))  # type: ignore[arg-type]
                times: dict[str, list[float]] = {form: [] for form in forms}
                with torch.inference_mode():
                    for turn in range(options.rounds + 2):
                        for form, forward in loaded.items():
                            spent = seconds(partial(forward, batch))
                            if turn >= 2:  # the first two rounds are warm-up
                                times[form].append(spent)
                for form, values in times.items():
                    rows[form]["seconds"][f"{size}, {threads} threads"] = statistics.median(values)
    return list(rows.values())


def bytes_of_weights(folder: Path) -> int:
    """Size of the files with weights."""
    return sum(path.stat().st_size for path in folder.iterdir() if path.suffix != ".json")


def measured_in_a_process(form: str, folder: Path) -> int:
    """`peak_memory` in a fresh process."""
    command = [sys.executable, __file__, "--peak_memory_of", form, str(folder)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def peak_memory(form: str, folder: Path) -> int:
    """Peak resident bytes while a form is loaded and runs three times, minus those before."""
    torch.set_num_threads(MEMORY_THREADS)
    for package in FORMS[form].packages:
        if package not in ("onnx", "onnxscript"):  # these only created the files
            importlib.import_module(package)
    batch = random_batch(MEMORY_SIZE)
    before = resident_memory("VmRSS")
    forward = FORMS[form].load(folder, MEMORY_THREADS)
    with torch.inference_mode():
        for _ in range(3):
            forward(batch)
    return resident_memory("VmHWM") - before


def processor() -> str:
    """Name of the processor, and whether it has VNNI, which decides how fast it multiplies integers."""
    name = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return f"{name and name[1]}, {torch.backends.cpu.get_cpu_capability()}, {'VNNI' if has_vnni() else 'no VNNI'}"


def table(rows: list[dict[str, Any]]) -> str:
    """In Markdown: times over the baseline's of the same model, megabytes, F1."""
    cases = list(rows[0]["seconds"])
    columns = ["model", "form", *cases, "file (MB)", "peak memory (MB)", "F1"]
    lines = [f"| {' | '.join(columns)} |", f"|---|---|{'---:|' * (len(columns) - 2)}"]
    for row in rows:
        base = next((other for other in rows if (other["model"], other["form"]) == (row["model"], BASELINE)), row)
        ratios = [f"{row['seconds'][case] / base['seconds'][case]:.2f}" for case in cases]
        megabytes = [f"{row[key] / 1e6:.1f}" for key in ("file_bytes", "peak_memory_bytes")]
        f1 = "" if row.get("f1") is None else f"{row['f1']:.2f}"
        lines.append(f"| {' | '.join([row['model'], row['form'], *ratios, *megabytes, f1])} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
