"""The cells (training runs) of a study, their syntax on the command line, and their arguments for `run_squad.py`."""

from __future__ import annotations

import json
import re
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any

from octav_hf import OctavConfig
from octav_hf.functional import CLIP_RULES

FP32 = "fp32"
FLOAT_WIDTH = "32"
MODES = ("dynamic", "static")
# weight and activation estimator (section 4 of the paper)
GRADIENTS = {"ste": ("ste", "ste"), "pwl": ("pwl", "pwl"), "mad": ("mad", "mad"), "mph": ("mad", "pwl")}
DEFAULT_GRADIENT = "mph"
# optional extras of a cell, in this order: fields of `Cell` and their labels
EXTRAS = {
    "fine": "fine clips",
    "shifted": "shifted",
    "distilled": "distilled",
    "group": "groups of {}",
    "learned": "learned",
    "reconstructed": "reconstructed",
    "features": "with features",
}
GROUPED = ("input", "probabilities", "value")  # activations with groups along the contracted dimension
# arguments of `octav_hf.distill` for cells with features
FEATURES = {"distill_hidden_states": "1", "distill_attentions": "1", "distill_feature_steps": "0.6"}
RECONSTRUCT_BATCHES = 12
PERCENTILE = "percentile"
SYNTAX = (
    f"{FP32}, or MODE-CLIP:BITS, MODE-CLIP-GRADIENT:BITS or MODE-CLIP-EXTRAS:BITS with MODE {' or '.join(MODES)}; "
    f"CLIP one of {', '.join(sorted(CLIP_RULES))}, percentile with its number, as in percentile99.99; GRADIENT one of "
    f"{', '.join(GRADIENTS)} ({DEFAULT_GRADIENT} where it is left out); EXTRAS "
    f"any of {', '.join(EXTRAS)} in this order, with dashes between, group with its size, as in group32; BITS such as "
    f"4 or 4-8 or 4,6,8, or W4A8 for weights and activations of different widths"
)
_METHOD = re.compile(
    rf"({'|'.join(MODES)})-({'|'.join(map(re.escape, CLIP_RULES))})(\d+(?:\.\d+)?)?(?:-({'|'.join(GRADIENTS)}))?"
    + "".join(f"(?:-({extra}))?" for extra in EXTRAS).replace("group", r"group\d+")
)
_BITS = re.compile(r"\d(-\d)?(,\d(-\d)?)*")
_TWO_WIDTHS = re.compile(r"W([2-8])A([2-8])")


@dataclass(frozen=True)
class Cell:
    """One training run of a study.

    Args:
        mode: "dynamic" for dynamic clips, "static" for clips that are calibrated before training (Appendix E.3); None
            for the float model, as for the next three.
        clip: clipping rule of weights and activations.
        percentile: option of the rule "percentile"; None for other rules.
        gradient: key of `GRADIENTS`.
        bits: bits of weights and activations, or only of weights if `activation_bits` is given; None for the float
            model.
        seed: seed of the training questions, their order, the new head and dropout.
        fine: whether linear inputs, query, key and probabilities have a clip per token, and the value one per channel,
            instead of one per tensor.
        shifted: `OctavConfig.asymmetric_activations`.
        distilled: whether the float model from which training starts is the teacher.
        group: group size along the contracted dimension of weights, linear inputs, probabilities and value; None for no
            groups.
        learned: whether static clips of activations are learned (`calibrate_octav(learned=True)`).
        reconstructed: whether layers are first reconstructed by least squares (`reconstruct`).
        features: whether hidden states and attention maps are distilled too.
        activation_bits: bits of activations if they differ from those of weights, otherwise None.
    """

    mode: str | None
    clip: str | None
    percentile: float | None
    gradient: str | None
    bits: int | None
    seed: int
    fine: bool = False
    shifted: bool = False
    distilled: bool = False
    group: int | None = None
    learned: bool = False
    reconstructed: bool = False
    features: bool = False
    activation_bits: int | None = None

    @property
    def method(self) -> str:
        """The cell without bits and seed, in the syntax of the command line."""
        if self.mode is None:
            return FP32
        percentile = "" if self.percentile is None else f"{self.percentile:g}"
        gradient = "" if self.gradient == DEFAULT_GRADIENT else f"-{self.gradient}"
        return f"{self.mode}-{self.clip}{percentile}{gradient}{''.join(f'-{extra}' for extra in self.extras)}"

    @property
    def name(self) -> str:
        """A file name that is unique in a study."""
        bits = "" if self.bits is None else f"-{self.width}{'bit' if self.activation_bits is None else ''}"
        return f"{self.method}{bits}-seed{self.seed}"

    @property
    def width(self) -> str:
        """The bits in words: `FLOAT_WIDTH` for the float model."""
        if self.activation_bits is not None:
            return f"W{self.bits}A{self.activation_bits}"
        return FLOAT_WIDTH if self.bits is None else str(self.bits)

    @property
    def extras(self) -> list[str]:
        """The `EXTRAS` of the cell, in the syntax of the command line."""
        return [f"group{self.group}" if extra == "group" else extra for extra in EXTRAS if getattr(self, extra)]

    @property
    def label(self) -> str:
        """The method in words."""
        if self.mode is None:
            return "FP32"
        clip = {"octav": "OCTAV", "max": "max-scaling", "mse": "MSE", "mse_sweep": "MSE sweep"}.get(
            str(self.clip), str(self.clip)
        )
        if self.percentile is not None:
            clip = f"{self.percentile:g} %"
        gradient = "" if self.gradient == DEFAULT_GRADIENT else f", {str(self.gradient).upper()}"
        extras = [words.format(self.group) for extra, words in EXTRAS.items() if getattr(self, extra)]
        return ", ".join([f"{self.mode} {clip}{gradient}", *extras])

    @property
    def place(self) -> tuple[float, ...]:
        """Sort key for the order of the paper's Table 5; other estimators come last."""
        clips = ["octav", "max", "mse_sweep", PERCENTILE, *CLIP_RULES]
        extras = sum(2**i for i, extra in enumerate(EXTRAS) if getattr(self, extra))
        if self.mode is None:
            return (0, 0, extras, 0, 0, 0, 0, 0, self.seed)
        method = (1 + list(GRADIENTS)[::-1].index(str(self.gradient)), MODES.index(self.mode))
        widths = (self.bits or 0, self.activation_bits or 0)
        return (*method, extras, self.group or 0, clips.index(str(self.clip)), self.percentile or 0, *widths, self.seed)

    def arguments(self, static_batches: int, model: str) -> list[str]:
        """The arguments of `run_squad.py` in which this cell differs from others of its study.

        Args:
            static_batches: number of training batches for the calibration of static clips.
            model: the model from which training starts.
        """
        arguments = ["--seed", str(self.seed)]
        if self.mode is None:
            return arguments
        weight_gradient_estimator, activation_gradient_estimator = GRADIENTS[str(self.gradient)]
        values = {
            "quantize": "true",
            "weight_bits": str(self.bits),
            "activation_bits": str(self.activation_bits or self.bits),
            "weight_clip": str(self.clip),
            "activation_clip": str(self.clip),
            "weight_gradient_estimator": weight_gradient_estimator,
            "activation_gradient_estimator": activation_gradient_estimator,
        }
        if self.percentile is not None:
            options = json.dumps({"percentile": self.percentile})
            values |= {"weight_clip_options": options, "activation_clip_options": options}
        granularity: dict[str, str] = dict(OctavConfig.accurate().activation_granularity) if self.fine else {}
        if self.group is not None:
            granularity |= dict.fromkeys(GROUPED, "group")
            values |= {"weight_granularity": "group", "group_size": str(self.group)}
        if granularity:
            values["activation_granularity"] = json.dumps(granularity)
        if self.shifted:
            values["asymmetric_activations"] = "true"
        if self.distilled:
            values["distill_from"] = model
        if self.features:
            values |= FEATURES
        if self.reconstructed:
            values["reconstruct_batches"] = str(RECONSTRUCT_BATCHES)
        if self.mode == "static":
            values["static_clip_batches"] = str(static_batches)
        if self.learned:
            values["learned_clips"] = "true"
        return [*arguments, *(word for name, value in values.items() for word in (f"--{name}", value))]

    def to_dict(self) -> dict[str, Any]:
        """The fields."""
        return asdict(self)


_EVERY_EXTRA: dict[str, Any] = {extra: 32 if extra == "group" else True for extra in EXTRAS}
_EVERY_ARGUMENT = Cell("static", PERCENTILE, 99.9, DEFAULT_GRADIENT, 4, 0, **_EVERY_EXTRA).arguments(1, "model")
CELL_ARGUMENTS = {word for word in _EVERY_ARGUMENT if word.startswith("--")}
"""Arguments that `Cell.arguments` may set."""


def cell_of(line: dict[str, Any]) -> Cell:
    """The cell of a line of a results file, which has the fields of `Cell` and others; extras may be missing."""
    names = [field.name for field in fields(Cell) if field.name in line or field.default is MISSING]
    return Cell(**{name: line[name] for name in names})


def parse_cells(texts: list[str], seeds: list[int]) -> list[Cell]:
    """The cells that `texts` (see `SYNTAX`) describe, seed by seed, without duplicates.

    Raises:
        ValueError: a text has another form.
    """
    cells = [cell for seed in seeds for text in texts for cell in _parse(text, seed)]
    return list(dict.fromkeys(cells))


def _parse(text: str, seed: int) -> list[Cell]:
    if text == FP32:
        return [Cell(None, None, None, None, None, seed)]
    method, _, bits = text.partition(":")
    match = _METHOD.fullmatch(method)
    two = _TWO_WIDTHS.fullmatch(bits)
    if match is None or (two is None and _BITS.fullmatch(bits) is None):
        raise ValueError(f"{text!r} is not a cell. Write {SYNTAX}.")
    mode, clip, percentile, gradient, *extras = match.groups()
    has: dict[str, Any] = {extra: given is not None for extra, given in zip(EXTRAS, extras, strict=True)}
    group = extras[list(EXTRAS).index("group")]
    has["group"] = None if group is None else int(group.removeprefix("group"))
    if (clip == PERCENTILE) != (percentile is not None):
        raise ValueError(f"{text!r}: {PERCENTILE} has a number, as in {PERCENTILE}99.9, and no other clip has one.")
    if has["learned"] and mode != "static":
        raise ValueError(f"{text!r}: static clips are learned, so write static in the place of {mode}.")
    if has["features"] and not has["distilled"]:
        raise ValueError(f"{text!r}: features are a teacher's, so write distilled too.")
    number = None if percentile is None else float(percentile)
    if two is not None:
        widths, has["activation_bits"] = [int(two[1])], int(two[2])
    else:
        widths = _widths(text, bits)
    return [Cell(mode, clip, number, gradient or DEFAULT_GRADIENT, width, seed, **has) for width in widths]


def _widths(text: str, bits: str) -> list[int]:
    widths: list[int] = []
    for part in bits.split(","):
        first, _, last = part.partition("-")
        widths += range(int(first), int(last or first) + 1)
    if not widths or not all(2 <= width <= 8 for width in widths):
        raise ValueError(f"{text!r}: bits are 2 to 8, as in 4 or 4-8 or 4,6,8.")
    return widths
