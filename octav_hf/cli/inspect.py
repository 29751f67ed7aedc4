"""``inspect``: what a checkpoint is."""

import argparse
import json
import os
from typing import Any

from .._utils.escaping import escaped, shown
from .._utils.text_table import aligned
from ..config import OctavConfig
from ..hub.checkpoint_folder import CheckpointFolder, summary
from ..hub.model_card import bits_in_words
from ..nn.granularity import granularity_in_words
from .arguments import sizes_in_words

_MAX_NAMES = 8  # of modules in one line


def add_inspect(commands: Any) -> None:
    inspect = commands.add_parser("inspect", help="show what a checkpoint is, and check that it is whole")
    inspect.add_argument("source", metavar="SOURCE", type=os.path.expanduser, help="folder, or id of a repository")
    inspect.add_argument("--json", action="store_true", help="for programs")
    inspect.set_defaults(run=_inspect)


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
    print(sizes_in_words(facts))
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
