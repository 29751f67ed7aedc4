"""Evaluate an exported model on SQuAD questions with onnxruntime, without importing torch or octav_hf.

    python evaluate_onnx.py --model_folder exported --validation_file dev.json --output_dir out

The folder, with `model.onnx` and the tokenizer, was written by `octav-hf export --format onnx` or
`run_squad.py --export_onnx`. Questions, windows and answers are the same as in `run_squad.py --do_eval` with the same
arguments. The script writes `onnx_results.json`, `onnx_predictions.json` and `onnx_nbest_predictions.json`.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnxruntime
from datasets import Dataset
from squad_task.data_arguments import DataArguments
from squad_task.features import evaluation_features
from squad_task.scores import scores_v1, scores_v2
from transformers import HfArgumentParser, PreTrainedTokenizerBase, PreTrainedTokenizerFast

OUTPUTS = ("start_logits", "end_logits")


@dataclass
class SessionArguments:
    """The model to evaluate, and how."""

    model_folder: str = field(metadata={"help": "Folder with model.onnx and the tokenizer's files."})
    output_dir: str = field(metadata={"help": "Where to write scores and answers."})
    batch_size: int = field(default=32, metadata={"help": "Windows per batch."})
    threads: int = field(default=0, metadata={"help": "Threads of onnxruntime; 0 for its default."})


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Answer the questions, write and return the scores.

    Raises:
        ValueError: an argument would be ignored, the data cannot be used, or the graph is not that of a
            question-answering model.
        FileNotFoundError: the folder has no `model.onnx`.
    """
    parser = HfArgumentParser([SessionArguments, DataArguments], description=(__doc__ or "").split("\n")[0])
    options, data_args = parser.parse_args_into_dataclasses(args=argv)
    if data_args.train_file or data_args.max_train_samples:
        raise ValueError("--train_file and --max_train_samples would be ignored: leave them out.")
    session = open_session(Path(options.model_folder) / "model.onnx", options.threads)
    names = [each.name for each in session.get_inputs()]
    # AutoTokenizer would import torch
    tokenizer = PreTrainedTokenizerFast.from_pretrained(options.model_folder, model_input_names=names)
    examples = data_args.evaluation_examples()
    features = evaluation_features(examples, tokenizer, data_args.windows())
    begin = time.perf_counter()
    start_logits, end_logits = run(session, features, tokenizer, options.batch_size)
    seconds = time.perf_counter() - begin
    predictions = data_args.predict(examples, features, start_logits, end_logits)
    predictions.write(options.output_dir, "onnx")
    answers = dict(zip(examples["id"], (row["text"] for row in examples["answers"]), strict=True))
    if data_args.version_2_with_negative:
        scores = scores_v2(predictions.texts, answers, dict(predictions.null_probability), threshold=1.0)
    else:
        scores = scores_v1(predictions.texts, answers)
    results = {f"onnx_{name}": value for name, value in scores.items()}
    results |= {"onnx_runtime": seconds, "onnx_samples": len(examples)}
    text = json.dumps(results, indent=4) + "\n"
    (Path(options.output_dir) / "onnx_results.json").write_text(text, encoding="utf-8")
    print(text, end="")
    return results


def open_session(path: Path, threads: int = 0) -> onnxruntime.InferenceSession:
    """A CPU session in which sums of 8-bit products are exact on every processor."""
    if not path.is_file():
        raise FileNotFoundError(f"There is no {path}. Give a folder that `octav-hf export --format onnx` wrote.")
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = threads
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.is_file() or "vnni" not in cpuinfo.read_text():
        # without it, uint8 times int8 saturates on AVX2; with VNNI it is not needed and slower
        settings.add_session_config_entry("session.x64quantprecision", "1")
    session = onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    if not {*OUTPUTS} <= {*names}:
        raise ValueError(f"{path} has the outputs {', '.join(names)}, not {' and '.join(OUTPUTS)}.")
    return session


def run(
    session: onnxruntime.InferenceSession, features: Dataset, tokenizer: PreTrainedTokenizerBase, batch_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Start and end logits, float32 (F, T): a row per feature, 0 beyond the longest feature of its batch."""
    inputs = features.select_columns(tokenizer.model_input_names)
    logits = np.zeros((2, len(features), max(map(len, features["input_ids"]))), np.float32)
    for first in range(0, len(features), batch_size):
        batch = tokenizer.pad(inputs[first : first + batch_size], return_tensors="np")
        outputs = session.run(OUTPUTS, {name: value.astype(np.int64) for name, value in batch.items()})
        for rows, output in zip(logits, outputs, strict=True):
            rows[first : first + len(output), : output.shape[1]] = output
    return logits[0], logits[1]


if __name__ == "__main__":
    main()
