"""Measure the clips of a fine-tuned model's tensors as in the paper: error, time, convergence, second minima.

    python measure_clips.py --model_name_or_path MODEL --train_file train.json --bits 4 6 8 --output_dir runs/clips
    python measure_clips.py --render runs/clips/clips.json

The model runs on one training batch, and the input of every quantizer is measured at each number of bits. A float model
is quantized for each number of bits; a quantized model is measured as it is, with its own bits. Everything runs on the
CPU. The first command writes `clips.json`. Both commands write `clips.md` and the plots (PNG and SVG) from it.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from clip_measurements.artefacts import write_artefacts
from clip_measurements.measurements import measure, sequences
from clip_measurements.report import clip_ratio
from clip_measurements.tensors import SeenTensor, seen_tensors
from reporting.run_environment import environment
from reporting.script_options import fill_in, refuse_given
from squad_task.features import Windows, training_batch
from transformers import AutoConfig, AutoModelForQuestionAnswering, AutoTokenizer, set_seed

from octav_hf import OctavConfig, apply_octav, remove_octav
from octav_hf.functional.grid import MAX_BITS, MIN_BITS

DETAILED = ("weight", "input", "probabilities")
_DIGITS = 7


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measure or read the measurements, write tables and plots, and return the content of `clips.json`.

    Raises:
        FileExistsError: `--output_dir` already has a `clips.json`.
        ValueError: the model is packed or has no quantized tensor, or the data cannot be used.
    """
    options = parse_arguments(argv)
    if options.render is None:
        path = options.output_dir / "clips.json"
        if path.exists():
            raise FileExistsError(f"{path} exists. Choose another --output_dir, or remove the file.")
        record = run(options, sys.argv[1:] if argv is None else argv)
        options.output_dir.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(_rounded(record), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    else:
        path = options.render
    return render(path, options.output_dir or path.parent)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Parse the options; refuse combinations in which an option would be ignored."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument(
        "--render", type=Path, help="clips.json from which to write tables and plots, without measuring"
    )
    parser.add_argument("--output_dir", type=Path, help="output folder; default with --render: that of the file")
    measuring = parser.add_argument_group("measuring")
    measuring.add_argument("--model_name_or_path", help="folder or name of a float or a quantized model")
    measuring.add_argument("--train_file", help="SQuAD JSON file from which the batch is drawn")
    measuring.add_argument(
        "--bits", nargs="+", type=int, choices=range(MIN_BITS, MAX_BITS + 1), help="default: 4", metavar="BITS"
    )
    measuring.add_argument("--max_samples", type=int, help="windows in the batch; default: 8")
    measuring.add_argument("--max_seq_length", type=int, help="tokens of a window; default: 384")
    measuring.add_argument("--doc_stride", type=int, help="tokens that neighbouring windows share; default: 128")
    measuring.add_argument("--max_query_length", type=int, help="longer questions are truncated; default: 64")
    measuring.add_argument("--repetitions", type=int, help="number of rounds for median processor times; default: 3")
    measuring.add_argument("--seed", type=int, help="of the batch, of dropout and of a new head; default: 0")
    options = parser.parse_args(argv)
    defaults = {
        "bits": [4],
        "max_samples": 8,
        "max_seq_length": 384,
        "doc_stride": 128,
        "max_query_length": 64,
        "repetitions": 3,
        "seed": 0,
    }
    if options.render is not None:
        names = ("model_name_or_path", "train_file", *defaults)
        refuse_given(parser, options, names, ": --render measures nothing")
        if not options.render.is_file():
            parser.error(f"there is no file {options.render} to render")
        return options
    missing = [f"--{n}" for n in ("model_name_or_path", "train_file", "output_dir") if getattr(options, n) is None]
    if missing:
        parser.error(f"{', '.join(missing)} missing (or --render CLIPS_JSON)")
    fill_in(parser, options, defaults, counts=("max_samples", "repetitions"))
    options.bits = sorted(set(options.bits))
    return options


def run(options: argparse.Namespace, command: list[str]) -> dict[str, Any]:
    """The content of `clips.json`."""
    about = environment(torch.get_num_threads())  # first, because files may be edited while this runs
    set_seed(options.seed)
    tokenizer = AutoTokenizer.from_pretrained(options.model_name_or_path)
    windows = Windows(options.max_seq_length, options.doc_stride, options.max_query_length, pad_to_max_length=False)
    windows.check(tokenizer)
    windows.check_model(AutoConfig.from_pretrained(options.model_name_or_path))
    batch = training_batch(options.train_file, tokenizer, windows, options.max_samples, options.seed)
    model = AutoModelForQuestionAnswering.from_pretrained(options.model_name_or_path, dtype=torch.float32).train()
    is_float = getattr(model.config, "quantization_config", None) is None
    measured = []
    for bits in options.bits:
        if is_float:
            apply_octav(model, OctavConfig(weight_bits=bits, activation_bits=bits))
        set_seed(options.seed)
        tensors = seen_tensors(model, batch)
        print(f"{bits} bits: {len(tensors)} tensors", flush=True)
        measured.append({"bits": bits, **measure_all(tensors, bits, options.repetitions)})
        if is_float:
            remove_octav(model)
    return {
        "model": Path(options.model_name_or_path).name,
        "quantized": "as it was" if not is_float else "by this script, a clip for each row of a weight",
        "train_file": Path(options.train_file).name,
        "batch": list(batch["input_ids"].shape),
        "windows": {n: getattr(options, n) for n in ("max_seq_length", "doc_stride", "max_query_length")},
        "repetitions": options.repetitions,
        "seed": options.seed,
        "command": command,
        "measured": measured,
        **about,
    }


def measure_all(tensors: Sequence[SeenTensor], bits: int, repetitions: int) -> dict[str, Any]:
    """`tensors` with a measurement of each, and details of one tensor of each kind in `DETAILED`.

    The details are `sequences` of the recursion for the tensor with the largest outlier, and `curves` of the error for
    the tensor whose sweep clip exceeds OCTAV's most.
    """
    records, curves = zip(*(measure(seen, bits, repetitions) for seen in tensors), strict=True)
    chosen: dict[str, list[dict[str, Any]]] = {"sequences": [], "curves": []}
    for kind in DETAILED:
        group = [i for i, seen in enumerate(tensors) if seen.kind == kind]
        if group:
            chosen["sequences"].append(sequences(tensors[max(group, key=lambda i: records[i]["outlier"])], bits))
            chosen["curves"].append(max((curves[i] for i in group), key=clip_ratio))
    return {"tensors": list(records), **chosen}


def render(path: Path, output_dir: Path) -> dict[str, Any]:
    """Write tables and plots from the file, print the tables, and return its content.

    Raises:
        ValueError: the file was not written by this script.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        print(write_artefacts(record, output_dir))
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a clips.json of this script ({error!r}).") from error
    return record


def _rounded(node: Any) -> Any:
    """Round numbers to `_DIGITS` digits, and replace those that are not finite with None, because JSON lacks them."""
    if isinstance(node, float):
        return float(f"{node:.{_DIGITS}g}") if math.isfinite(node) else None
    if isinstance(node, dict):
        return {key: _rounded(value) for key, value in node.items()}
    return [_rounded(value) for value in node] if isinstance(node, list) else node


if __name__ == "__main__":
    main()
