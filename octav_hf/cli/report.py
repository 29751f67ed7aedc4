"""``report``: which layers of a checkpoint lose most."""

import argparse
import os
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ..analysis.report import report
from ..conversion.modules import is_quantized
from ..hub.checkpoint_folder import CheckpointFolder
from .arguments import path
from .text_batches import text_batches


def add_report(commands: Any) -> None:
    parser = commands.add_parser("report", help="show which layers lose most, as a page and as JSON beside it")
    parser.add_argument(
        "source", metavar="CHECKPOINT", type=os.path.expanduser, help="folder, or id of a repository; in training form"
    )
    parser.add_argument(
        "--data",
        required=True,
        type=path,
        metavar="FILE",
        help="examples: SQuAD's JSON, or JSON lines of text and text_pair",
    )
    parser.add_argument(
        "--teacher",
        metavar="CHECKPOINT",
        type=os.path.expanduser,
        help="float model to compare with; default: the same model with every quantizer off",
    )
    parser.add_argument("--output", type=path, default=Path("report.html"), metavar="FILE", help="default %(default)s")
    parser.add_argument("--max-examples", type=int, default=64, metavar="NUMBER", help="default %(default)s")
    parser.add_argument("--batch-size", type=int, default=8, metavar="NUMBER", help="default %(default)s")
    parser.set_defaults(run=_report)


def _report(options: argparse.Namespace) -> None:
    source = CheckpointFolder(options.source)
    model = source.load()
    batches = text_batches(options.data, source.path, model, options.max_examples, options.batch_size)
    teacher = None if options.teacher is None else _float_model(options.teacher, type(model))
    print(report(model, batches, teacher, path=options.output))
    print(f"wrote {options.output} and {options.output.with_suffix('.json')}")


def _float_model(source: str, model_class: type[PreTrainedModel]) -> PreTrainedModel:
    """The float model; ``ValueError`` if it is quantized, or lacks a weight."""
    loaded: Any = model_class.from_pretrained(source, output_loading_info=True, trust_remote_code=False)
    teacher, info = loaded
    if is_quantized(teacher):
        raise ValueError(f"{source} is quantized; --teacher is the float model, or is left out")
    if info["missing_keys"]:
        missing = ", ".join(sorted(info["missing_keys"]))
        raise ValueError(
            f"{source}: {missing} missing, which would be random; give a fine-tuned {model_class.__name__}"
        )
    return teacher
