"""The data of a report, to and from JSON."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .._utils.atomic_file import write_atomically
from .._utils.json_file import read_json
from .._utils.plain_data import from_plain, to_plain
from ..coverage.report import Operand
from .layer_bytes import LayerBytes
from .operand_statistics import OperandStatistics
from .output_errors import OutputError
from .sensitivity import KindSensitivity, ModuleSensitivity
from .suggestions import Suggestion
from .verdict import verdict


@dataclass(frozen=True)
class Unmeasured:
    """What could not be measured, and why.

    Attributes:
        what: ``"operands"``, or the name of a field of ``Report`` that is empty.
        names: module and operand, of operands.
    """

    what: str
    reason: str
    names: list[str]


@dataclass(frozen=True)
class Report:
    """What ``report`` measured. ``print`` shows the verdict and the suggestions.

    Attributes:
        model: the class of the model.
        compared_with: what outputs and logits are compared with, in words.
        batches: number of batches that were run.
        config: ``OctavConfig.to_dict`` of the model as it is.
        operands: every operand, quantized or in float and why, as ``coverage_report`` lists them.
        statistics: of every quantized operand, with a histogram.
        functions: layer -> activation function whose output is its input.
        outputs: the error of each quantized module's output.
        divergence: of the outputs from those of the float model; ``None`` if it could not be measured.
        divergence_measure: name and unit of the divergence, for ``kinds`` and ``sensitivity`` too.
        kinds: sensitivity to each kind of operand in all layers, the largest first.
        sensitivity: sensitivity to each module.
        suggestions: the changes of the config that gain most for their cost, best first.
        layers: the bytes of each module's parameters in the packed form.
        unmeasured: what is missing above, and why.
    """

    model: str
    compared_with: str
    batches: int
    config: dict[str, Any]
    operands: list[Operand]
    statistics: list[OperandStatistics]
    functions: dict[str, str]
    outputs: list[OutputError]
    divergence: float | None
    divergence_measure: str
    kinds: list[KindSensitivity]
    sensitivity: list[ModuleSensitivity]
    suggestions: list[Suggestion]
    layers: list[LayerBytes]
    unmeasured: list[Unmeasured]

    @property
    def verdict(self) -> str:
        """Which operands change the outputs most, and what to change first."""
        return verdict(self.kinds, self.functions, self.divergence, self.statistics, self.suggestions)

    def __str__(self) -> str:
        lines = [f"-{100 * each.gain:.0f} %: {each.title}\n{each.code}" for each in self.suggestions]
        return "\n".join([self.verdict, *lines])

    def save(self, path: str | Path) -> None:
        """Write JSON to ``path``, whole or not at all. Numbers that are not finite are the strings "inf" and "nan"."""
        write_atomically(Path(path), json.dumps(to_plain(self), indent=1, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "Report":
        """Read what ``save`` wrote; ``ValueError`` if the file has another form."""
        try:
            return from_plain(cls, read_json(Path(path)))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} is no report of this version of octav_hf: {error}") from error
