"""Facts about a training run for the model card, stored in a file next to the model."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from .._utils.escaping import shown
from .._utils.json_file import read_json

FILE_NAME = "octav_run.json"


@dataclass(frozen=True)
class TrainingRun:
    """Facts about a training run; the card leaves out unknown ones. ``ValueError`` for a metric that is not finite."""

    base_model: str | None = None  # repository or folder of the model that training started from
    dataset: str | None = None
    dataset_split: str | None = None  # on which the metrics were computed
    recipe: Mapping[str, Any] = field(default_factory=dict)  # hyperparameter -> value
    metrics: Mapping[str, float] = field(default_factory=dict)  # name, such as "f1" -> value of the quantized model
    fp32_metrics: Mapping[str, float] = field(default_factory=dict)  # of a float model trained with the same recipe

    def __post_init__(self) -> None:
        for name in ("base_model", "dataset", "dataset_split"):
            value = getattr(self, name)
            if value is not None and not _is_name(value):
                raise ValueError(f"TrainingRun: {name} must be a printable string or None, got {shown(value)}")
        for name in ("recipe", "metrics", "fp32_metrics"):
            values = getattr(self, name)
            if not isinstance(values, Mapping) or not all(map(_is_name, values)):
                raise ValueError(f"TrainingRun: {name} must map printable names to values, got {shown(values)}")
        for hyperparameter, value in self.recipe.items():
            if not isinstance(value, str | int | float | None) and not _is_flat(value):
                raise ValueError(
                    f"TrainingRun: recipe[{shown(hyperparameter)}] must be a string, a number, True, False, None or a "
                    f"list of these, got {shown(value)}"
                )
        for name in ("metrics", "fp32_metrics"):
            for metric, value in getattr(self, name).items():
                if not _is_finite_number(value):
                    raise ValueError(
                        f"TrainingRun: {name}[{shown(metric)}] must be a finite number, got {shown(value)}"
                    )

    def save(self, folder: str | Path) -> None:
        """Write ``octav_run.json`` into an existing folder."""
        text = json.dumps(asdict(self), indent=2, sort_keys=True)
        (Path(folder) / FILE_NAME).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> "TrainingRun":
        """Read ``octav_run.json``; no facts if it does not exist, ``ValueError`` if it is invalid."""
        path = Path(folder) / FILE_NAME
        if not path.is_file():
            return cls()
        values = read_json(path)
        known = [entry.name for entry in fields(cls)]
        if not isinstance(values, dict) or not set(values) <= set(known):
            raise ValueError(f"{path} must be a JSON object with fields of {', '.join(known)}")
        try:
            return cls(**values)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def _is_finite_number(value: Any) -> bool:
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer that is too large for a float
        return False


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and value.isprintable()


def _is_flat(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(part, str | int | float | None) for part in value)
