"""``pack``, ``unpack`` and ``export``: a checkpoint in another form."""

import argparse
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ..export import to_onnx, verify_onnx
from ..export.example_inputs import random_inputs
from ..hub.checkpoint_folder import CheckpointFolder, summary
from ..hub.output_dir import atomic_output_dir
from ..hub.training_run import FILE_NAME as RUN_FILE
from ..hub.training_run import TrainingRun
from ..packing.pack import pack_octav, unpack_octav
from .arguments import display_name, path, sizes_in_words


def add_pack(commands: Any) -> None:
    pack = commands.add_parser("pack", help="write the packed form: integer weights at their own width")
    _add_source_and_output(pack, "checkpoint in training form")
    pack.add_argument("--embedding-bits", type=int, metavar="BITS", help="also pack float embeddings, at 2 to 8 bits")
    pack.set_defaults(run=_pack)


def add_unpack(commands: Any) -> None:
    unpack = commands.add_parser("unpack", help="write the training form of a packed checkpoint")
    _add_source_and_output(unpack, "packed checkpoint")
    unpack.set_defaults(run=_unpack)


def add_export(commands: Any) -> None:
    export = commands.add_parser("export", help="write a checkpoint with static clips for another runtime")
    export.add_argument("--format", required=True, choices=["onnx"], help="needs pip install 'octav-hf[onnx]'")
    _add_source_and_output(export, "checkpoint in either form", shards=False)
    export.add_argument("--verify", action="store_true", help="run it and compare it with the model before it is kept")
    export.set_defaults(run=_export)


def _add_source_and_output(parser: argparse.ArgumentParser, source: str, shards: bool = True) -> None:
    parser.add_argument(
        "source", metavar="SOURCE", type=os.path.expanduser, help=f"{source}: a folder, or the id of a repository"
    )
    parser.add_argument("output", metavar="OUTPUT", type=path, help="folder to write, which must not exist or be empty")
    if shards:
        parser.add_argument("--max-shard-size", default="50GB", metavar="SIZE", help="such as 2GB; default %(default)s")


def _pack(options: argparse.Namespace) -> None:
    source = CheckpointFolder(options.source)
    if source.config.packed:
        raise ValueError(f"{options.source} is packed already")
    with atomic_output_dir(options.output) as folder:
        model = pack_octav(source.load(), embedding_bits=options.embedding_bits)
        _write(model, source, folder, options, same_outputs=options.embedding_bits is None)
    _report(options.output)


def _unpack(options: argparse.Namespace) -> None:
    source = CheckpointFolder(options.source)
    if not source.config.packed:
        raise ValueError(f"{options.source} is not packed; train it as it is")
    with atomic_output_dir(options.output) as folder:
        _write(unpack_octav(source.load()), source, folder, options, same_outputs=False)
    _report(options.output)


def _export(options: argparse.Namespace) -> None:
    source = CheckpointFolder(options.source)
    with atomic_output_dir(options.output) as folder:
        model = source.load()
        inputs = random_inputs(model)
        file = to_onnx(model, folder, inputs)
        left_out = source.copy_companions(folder)
        for name in ("README.md", RUN_FILE):  # which say how the checkpoint is loaded, and what it scored
            (folder / name).unlink(missing_ok=True)
        check = verify_onnx(model, folder, inputs) if options.verify else None
        size = file.stat().st_size
    print("".join(f"left out: {', '.join(left_out)}\n" if left_out else ""), end="")
    print(f"wrote {options.output}: {file.name} of {size:,} bytes" + ("" if check is None else f"; {check}"))


def _write(
    model: PreTrainedModel, source: CheckpointFolder, folder: Path, options: argparse.Namespace, *, same_outputs: bool
) -> None:
    model.save_pretrained(folder, max_shard_size=options.max_shard_size)
    left_out = source.copy_companions(folder)
    if left_out:
        print(f"left out: {', '.join(left_out)}")
    run = TrainingRun.load(folder)
    if run.metrics and not same_outputs:
        replace(run, metrics={}, fp32_metrics={}).save(folder)
        print("the outputs are not quite the same, so the card has no metrics; evaluate anew")
    CheckpointFolder(str(folder)).write_card(display_name(options.output))


def _report(output: Path) -> None:
    facts = summary(CheckpointFolder(str(output)))
    print(f"wrote {output}: {facts['form']} form, {sizes_in_words(facts)}")
