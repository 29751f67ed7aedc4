"""Command-line arguments of `run_squad.py`: model, quantization and outputs."""

from __future__ import annotations

import json
from dataclasses import Field, dataclass, field, fields, make_dataclass
from pathlib import Path
from typing import Any, Optional, Union

from octav_hf import OctavConfig
from octav_hf.config import WRITTEN_FIELDS
from octav_hf.functional import CLIP_RULES

# HfArgumentParser reads the annotations at run time and takes `Optional` fields only in this form.
# ruff: noqa: UP007, UP045
METRICS = ("f1", "exact_match")
DISTILLATION = ("weight", "temperature", "hidden_states", "attentions", "layers", "feature_steps")


@dataclass
class ModelArguments:
    """The model to train, and the teacher."""

    model_name_or_path: str = field(metadata={"help": "Folder or name of a model with a fast tokenizer."})
    distill_from: Optional[str] = field(
        default=None,
        metadata={
            "help": "Folder or name of a teacher, such as the float model fine-tuned on the same questions. The model "
            "learns its logits instead of the answers. Needs --do_train and a tokenizer with the same vocabulary."
        },
    )
    distill_weight: Optional[float] = field(
        default=None,
        metadata={
            "help": "With --distill_from: weight of the teacher's logits; the answers have the rest. Default: 1."
        },
    )
    distill_temperature: Optional[float] = field(
        default=None, metadata={"help": "With --distill_from: temperature, by which logits are divided. Default: 2."}
    )
    distill_hidden_states: Optional[float] = field(
        default=None, metadata={"help": "With --distill_from: weight of the teacher's hidden states. Default: 0."}
    )
    distill_attentions: Optional[float] = field(
        default=None,
        metadata={
            "help": "With --distill_from: weight of the teacher's attention maps. Both models then use "
            'attn_implementation="eager". Default: 0.'
        },
    )
    distill_layers: Optional[list[int]] = field(
        default=None,
        metadata={"help": "Indices of layers whose hidden states and maps are learned. Default: all."},
    )
    distill_feature_steps: Optional[float] = field(
        default=None,
        metadata={
            "help": "Fraction of the steps, from the start, in which hidden states and maps are learned. Default: 1."
        },
    )

    def __post_init__(self) -> None:
        given = [f"--distill_{name}" for name in self.distillation()]
        if given and not self.distill_from:
            raise ValueError(f"{', '.join(given)} would be ignored: add --distill_from, or leave them out.")

    def distillation(self) -> dict[str, Any]:
        """The arguments of `octav_hf.distill` that were given."""
        values = {name: getattr(self, f"distill_{name}") for name in DISTILLATION}
        return {name: value for name, value in values.items() if value is not None}

    def loading(self) -> dict[str, str]:
        """Arguments of `from_pretrained`: only eager attention returns attention maps."""
        return {"attn_implementation": "eager"} if self.distill_attentions else {}


def _config_argument(entry: Field[Any]) -> tuple[str, Any, Any]:
    """Name, type and field of the argument for a field of `OctavConfig`."""
    kind, prefix = Optional[str], ""
    if entry.name.endswith("_bits"):
        kind, prefix = Union[int, str, None], '"none" for None. '
    elif entry.name in _JSON_FIELDS:
        kind, prefix = Union[dict, str, None], "JSON object. "
    elif entry.name.endswith("_modules"):
        kind = Optional[list[str]]
    elif isinstance(entry.default, bool | int):
        kind = Optional[type(entry.default)]
    help = f"{prefix}{entry.metadata['help']} Default: that of OctavConfig."
    return entry.name, kind, field(default=None, metadata={"help": help})


_CONFIG_FIELDS = [entry for entry in fields(OctavConfig) if entry.init and entry.name not in WRITTEN_FIELDS]
_JSON_FIELDS = [entry.name for entry in _CONFIG_FIELDS if entry.default_factory is dict]
_ConfigArguments = make_dataclass("_ConfigArguments", map(_config_argument, _CONFIG_FIELDS))


@dataclass
class OctavArguments(_ConfigArguments):  # type: ignore[misc, valid-type]  # made of the config's fields
    """The fields of `octav_hf.OctavConfig`, and whether to quantize at all and with static clips.

    Only fields that are given are passed on; the others have the defaults of `OctavConfig`.
    """

    quantize: bool = field(default=False, metadata={"help": "Fine-tune with quantized matmuls."})
    static_clip_batches: Optional[int] = field(
        default=None,
        metadata={
            "help": "Train with static clips (the paper's Appendix E.3): those of the initial weights, and activation "
            "clips calibrated on this many random training batches. Default: clips are dynamic."
        },
    )
    learned_clips: Optional[bool] = field(
        default=None,
        metadata={"help": "With --static_clip_batches: learn a correction of each activation clip. Default: no."},
    )
    reconstruct_batches: Optional[int] = field(
        default=None,
        metadata={
            "help": "Before training, fit each layer's weights by least squares on this many random training batches, "
            "to the model of --distill_from or, without it, to the initial float model. Default: no."
        },
    )

    log_quantization: Optional[bool] = field(
        default=None,
        metadata={
            "help": "Add errors, clips and changed codes of the quantized operands to the training logs, and warn of "
            "quantizers that go wrong (octav_hf.OctavCallback). Not given: yes."
        },
    )

    def __post_init__(self) -> None:
        given = [f"--{f.name}" for f in fields(self) if f.name != "quantize" and getattr(self, f.name) is not None]
        for name in ("static_clip_batches", "reconstruct_batches"):
            count = getattr(self, name)
            if count is not None and count < 1:
                raise ValueError(f"--{name} must be at least 1, not {count}.")
        if self.learned_clips and not self.static_clip_batches:
            raise ValueError("--learned_clips corrects static clips: add --static_clip_batches.")
        if given and not self.quantize:
            raise ValueError(f"{', '.join(given)} would be ignored: add --quantize, or leave them out.")
        for name in ("weight_clip", "activation_clip"):
            rule = getattr(self, name)
            if rule is not None and rule not in CLIP_RULES:
                raise ValueError(f"--{name} is one of {', '.join(CLIP_RULES)}, not {rule!r}.")
        self.to_config()  # reports invalid values before anything is loaded

    def to_config(self) -> OctavConfig:
        """The configuration for `apply_octav`. Raises `ValueError` for values that cannot be used."""
        values = {entry.name: getattr(self, entry.name) for entry in _CONFIG_FIELDS}
        values = {name: value for name, value in values.items() if value is not None}
        for name, value in values.items():
            if name.endswith("_bits"):
                values[name] = _bits(value, name)
            elif name in _JSON_FIELDS and isinstance(value, str):
                values[name] = _json_object(value, name)
        return OctavConfig(**values)


@dataclass
class OutputArguments:
    """Outputs in addition to Trainer's own."""

    pack: bool = field(
        default=False,
        metadata={
            "help": "Also write the packed form, to OUTPUT_DIR/packed. With --do_eval it is evaluated too, and with "
            "--push_to_hub the repository contains it in the end."
        },
    )
    export_onnx: bool = field(
        default=False,
        metadata={
            "help": "Also write the model as ONNX with integer matmuls, to OUTPUT_DIR/onnx. Activation clips must be "
            "static: add --static_clip_batches or --calibration_batches. Needs the extra octav-hf[onnx]."
        },
    )
    also_evaluate: Optional[list[str]] = field(
        default=None,
        metadata={
            "help": "With --do_eval: evaluate the quantized model again in the end: simulated in float64, with integer "
            "arithmetic (convert_octav), or with the float64 reference of that (reference).",
            "choices": ["float64", "integer", "reference"],
        },
    )
    calibration_batches: Optional[int] = field(
        default=None,
        metadata={
            "help": "Calibrate and freeze activation clips on this many training batches, after training and before "
            "evaluation. Needs --train_file or --dataset_name. Default: clips stay dynamic."
        },
    )
    calibration_observer: Optional[str] = field(
        default=None,
        metadata={
            "help": "How --calibration_batches and --static_clip_batches compute activation clips: as the mean of the "
            "batches' clips, as in the paper, or from the histogram of all batches. Default: mean.",
            "choices": ["mean", "histogram"],
        },
    )
    fp32_results: Optional[str] = field(
        default=None,
        metadata={"help": "all_results.json of a float run with the same recipe, for comparison in the model card."},
    )

    def __post_init__(self) -> None:
        if self.calibration_batches is not None and self.calibration_batches < 1:
            raise ValueError(f"--calibration_batches must be at least 1, not {self.calibration_batches}.")

    def fp32_metrics(self) -> dict[str, float]:
        """F1 and EM of the float run. Raises `ValueError` when the file does not have them."""
        if self.fp32_results is None:
            return {}
        try:
            results = json.loads(Path(self.fp32_results).read_text(encoding="utf-8"))
            return {name: results[f"eval_{name}"] for name in METRICS}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"--fp32_results {self.fp32_results} is not an all_results.json of a run with --do_eval ({error!r})."
            ) from error


def _bits(value: int | str, name: str) -> int | None:
    if value == "none":
        return None
    try:
        return int(value)
    except ValueError as error:
        raise ValueError(f'--{name} is a number of bits, or "none" for float, not {value!r}.') from error


def _json_object(text: str, name: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"--{name} is not JSON ({error}). Write it as '{{\"key\": value}}'. Got: {text}") from error
    if not isinstance(value, dict):
        raise ValueError(f"--{name} must be a JSON object such as '{{\"key\": value}}'. Got: {text}")
    return value
