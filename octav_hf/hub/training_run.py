"""Facts about a training run for the model card, stored in a file beside the model."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

FILE_NAME = "octav_run.json"


@dataclass(frozen=True)
class TrainingRun:
    """Facts about a training run; the card leaves out unknown ones. ``ValueError`` for a metric that is not finite."""

    base_model: str | None = None  # repository or folder of the model that training started from
    dataset: str | None = None
    dataset_split: str | None = None  # that the metrics were computed on
    recipe: Mapping[str, Any] = field(default_factory=dict)  # hyperparameter -> value
    metrics: Mapping[str, float] = field(default_factory=dict)  # identifier, such as "f1" -> value when quantized
    fp32_metrics: Mapping[str, float] = field(default_factory=dict)  # of a model trained in float with this recipe

    def __post_init__(self) -> None:
        for name in ("metrics", "fp32_metrics"):
            for metric, value in getattr(self, name).items():
                if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                    raise ValueError(f"TrainingRun: {name}[{metric!r}] must be a finite number, got {value!r}")

    def save(self, folder: str | Path) -> None:
        """Write ``octav_run.json`` into an existing folder."""
        text = json.dumps(asdict(self), indent=2, sort_keys=True)
        (Path(folder) / FILE_NAME).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> "TrainingRun":
        """Read ``octav_run.json``; no facts if it does not exist, ``ValueError`` if it has another form."""
        path = Path(folder) / FILE_NAME
        if not path.is_file():
            return cls()
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is no JSON file: {error}") from error
        known = [entry.name for entry in fields(cls)]
        if not isinstance(values, dict) or not set(values) <= set(known):
            raise ValueError(f"{path} must be a JSON object with fields of {', '.join(known)}")
        try:
            return cls(**values)
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{path}: {error}") from error
