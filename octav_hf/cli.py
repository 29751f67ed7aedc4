"""The console command ``octav-hf``: pack, unpack, export, inspect and push checkpoints, and write their cards."""

import argparse
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub.utils import httpx
from transformers import PreTrainedModel, logging

from ._utils.escaping import escaped, shown
from ._utils.text_table import aligned
from .config import OctavConfig
from .export import to_onnx, verify_onnx
from .export.example_inputs import random_inputs
from .hub.checkpoint_folder import CheckpointFolder, summary
from .hub.model_card import bits_in_words
from .hub.output_dir import atomic_output_dir
from .hub.training_run import FILE_NAME as RUN_FILE
from .hub.training_run import TrainingRun
from .nn.granularity import granularity_in_words
from .packing.pack import pack_octav, unpack_octav

_MAX_NAMES = 8  # of modules in one line

# HTTPError covers errors of the Hub and failed connections; huggingface_hub exports the client that it uses.
_EXPECTED_ERRORS = (ValueError, OSError, NotImplementedError, ImportError, httpx.HTTPError)


def main(argv: list[str] | None = None) -> int:
    """Run the command with ``argv``, by default the process's, and return the exit status.

    It is 1 after an error, which is printed to stderr in one line. Progress bars appear if stderr is a terminal.
    """
    options = _parser().parse_args(argv)
    had_progress_bar = logging.is_progress_bar_enabled()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        options.run(options)
    except _EXPECTED_ERRORS as error:
        print(f"octav-hf: {escaped(' '.join(str(error).split()), longest=None)}", file=sys.stderr)
        return 1
    finally:
        if had_progress_bar:
            logging.enable_progress_bar()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="octav-hf", description="Checkpoints of models quantized with octav_hf.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    pack = commands.add_parser("pack", help="write the packed form: integer weights at their own width")
    _add_source_and_output(pack, "checkpoint in training form")
    pack.add_argument("--embedding-bits", type=int, metavar="BITS", help="also pack float embeddings, at 2 to 8 bits")
    pack.set_defaults(run=_pack)

    unpack = commands.add_parser("unpack", help="write the training form of a packed checkpoint")
    _add_source_and_output(unpack, "packed checkpoint")
    unpack.set_defaults(run=_unpack)

    export = commands.add_parser("export", help="write a checkpoint with static clips for another runtime")
    export.add_argument("--format", required=True, choices=["onnx"], help="needs pip install 'octav-hf[onnx]'")
    _add_source_and_output(export, "checkpoint in either form", shards=False)
    export.add_argument("--verify", action="store_true", help="run it and compare it with the model before it is kept")
    export.set_defaults(run=_export)

    inspect = commands.add_parser("inspect", help="show what a checkpoint is, and check that it is whole")
    inspect.add_argument("source", metavar="SOURCE", type=os.path.expanduser, help="folder, or id of a repository")
    inspect.add_argument("--json", action="store_true", help="for programs")
    inspect.set_defaults(run=_inspect)

    card = commands.add_parser("card", help="write README.md from the config and, if there is one, octav_run.json")
    card.add_argument("folder", metavar="FOLDER", type=os.path.expanduser)
    card.set_defaults(run=_card)

    push = commands.add_parser("push", help="upload a checkpoint in the form that it has, with its card")
    push.add_argument("folder", metavar="FOLDER", type=os.path.expanduser)
    push.add_argument("repo_id", metavar="REPO_ID", help="such as me/bert-4bit; it is created if need be")
    push.add_argument("--private", action="store_true", default=None, help="if the repository is created")
    push.add_argument("--revision", help="branch to push to; it is created if need be")
    push.add_argument("--commit-message")
    push.add_argument("--create-pr", action="store_true", help="open a pull request instead")
    push.set_defaults(run=_push)
    return parser


def _add_source_and_output(parser: argparse.ArgumentParser, source: str, shards: bool = True) -> None:
    parser.add_argument(
        "source", metavar="SOURCE", type=os.path.expanduser, help=f"{source}: a folder, or the id of a repository"
    )
    parser.add_argument(
        "output", metavar="OUTPUT", type=_path, help="folder to write, which must not exist or be empty"
    )
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
    CheckpointFolder(str(folder)).write_card(_name(options.output))


def _path(argument: str) -> Path:
    return Path(os.path.expanduser(argument))


def _name(folder: Path) -> str:
    """What a card calls a folder, which may be given as ``.``."""
    return Path(os.path.abspath(folder)).name


def _report(output: Path) -> None:
    facts = summary(CheckpointFolder(str(output)))
    print(f"wrote {output}: {facts['form']} form, {_sizes(facts)}")


def _inspect(options: argparse.Namespace) -> None:
    folder = CheckpointFolder(options.source)
    folder.load()
    facts = summary(folder)
    if options.json:
        print(json.dumps(facts, indent=1))
        return
    config = folder.config
    print(f"{options.source}: {facts['architecture']}, {facts['form']} form, format version {facts['format_version']}")
    print(f"weights: {', '.join(_weights(config, facts))}")
    print(f"activations: {', '.join(_activations(config, facts))}")
    print(f"embeddings: {bits_in_words(config.embedding_bits)}")
    print("".join(f"{line}\n" for line in _exceptions(config)), end="")
    header = ("layer", "bits", "shape", "stored as", "bytes", "in float32")
    rows = []
    for layer in facts["layers"]:
        sizes = (f"{layer[field]:,}" for field in ("bytes", "float32_bytes"))
        rows.append((layer["name"], str(layer["bits"]), str(layer["shape"]), layer["stored"], *sizes))
    print("\n".join(aligned([header, *rows])))
    print(_sizes(facts))
    print("every tensor is as it was saved" if config.packed else "every weight is there (values are not recorded)")


def _weights(config: OctavConfig, facts: dict[str, Any]) -> list[str]:
    if config.weight_bits is None:
        return [bits_in_words(None)]
    frozen = [f"frozen for {facts['frozen_weight_clips']} weights"] if facts["frozen_weight_clips"] else []
    clip = _clip(config.weight_clip, config.weight_clip_options)
    each = granularity_in_words(config.weight_granularity, config.group_size)
    return [bits_in_words(config.weight_bits), f"{clip} per {each}", *frozen]


def _activations(config: OctavConfig, facts: dict[str, Any]) -> list[str]:
    if config.activation_bits is None:
        return [bits_in_words(None)]
    operands = {
        operand: granularity_in_words(each, config.group_size)
        for operand, each in facts["activation_granularity"].items()
    }
    if not config.quantize_attention:
        operands = {"input": operands["input"]}
    frozen = f"frozen for {facts['frozen_clips']} activations" if facts["frozen_clips"] else "dynamic"
    if facts["frozen_clips"] and "token" in operands.values():
        frozen += " (where the config says per token, per tensor)"  # tokens have no identity across batches
    if facts["frozen_clips"] and any(operands[each].startswith("group") for each in operands if each != "input"):
        frozen += " (in attention no groups: per tensor, of a value per channel)"
    clip = _clip(config.activation_clip, config.activation_clip_options)
    attention = [] if config.quantize_attention else ["attention matmuls in floating point"]
    return [bits_in_words(config.activation_bits), f"{clip} {_granularities(operands)}", *attention, frozen]


def _granularities(operands: dict[str, str]) -> str:
    """What one clip is for, by operand where they differ."""
    found = dict.fromkeys(operands.values())
    if len(found) == 1:
        return f"per {next(iter(found))}"
    named = {each: ", ".join(operand for operand, own in operands.items() if own == each) for each in found}
    return ", ".join(f"per {each} ({names})" for each, names in named.items())


def _clip(rule: str, options: dict[str, Any]) -> str:
    return f"clip {rule}" + (f" ({_fields(options)})" if options else "")


def _exceptions(config: OctavConfig) -> list[str]:
    """A line for each setting that is not of the whole model."""
    lines = []
    if config.first_last_bits is not None:
        lines.append(f"first and last layer: {bits_in_words(config.first_last_bits)}")
    for title, patterns in (("excluded", config.exclude_modules), ("only", config.target_modules)):
        if patterns:
            lines.append(f"{title}: {_names(patterns)}")
    alike: dict[str, list[str]] = {}
    for pattern, override in config.module_overrides.items():
        alike.setdefault(_fields(override), []).append(pattern)
    return [*lines, *(f"override: {fields} for {_names(patterns)}" for fields, patterns in alike.items())]


def _fields(values: dict[str, Any]) -> str:
    return ", ".join(f"{escaped(name)}={shown(value)}" for name, value in values.items())


def _names(patterns: list[str]) -> str:
    names = ", ".join(map(escaped, patterns[:_MAX_NAMES]))
    return names + (f" and {len(patterns) - _MAX_NAMES} more" if len(patterns) > _MAX_NAMES else "")


def _sizes(facts: dict[str, Any]) -> str:
    stored, floating = facts["layer_bytes"], facts["layer_float32_bytes"]
    ratio = f", 1/{floating / stored:.2f} of float32" if stored else ""
    return f"quantized layers {stored:,} bytes{ratio}; files {facts['file_bytes']:,} bytes"


def _card(options: argparse.Namespace) -> None:
    folder = _local(options.folder)
    folder.write_card(_name(folder.path))
    print(f"wrote {folder.path / 'README.md'}")


def _push(options: argparse.Namespace) -> None:
    folder = _local(options.folder)
    commit = folder.push(
        options.repo_id,
        private=options.private,
        revision=options.revision,
        commit_message=options.commit_message,
        create_pr=options.create_pr,
    )
    print(commit.pr_url or commit.commit_url)


def _local(folder: str) -> CheckpointFolder:
    if not Path(folder).is_dir():
        raise ValueError(f"{folder} is not a folder")
    return CheckpointFolder(folder)


if __name__ == "__main__":
    sys.exit(main())
