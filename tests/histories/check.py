"""The conditions that must hold after each step of a history."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from octav_hf import coverage_report
from octav_hf.nn import FakeQuantize

REFUSALS = (ValueError, TypeError, NotImplementedError, RuntimeError)
"""What a call may raise."""

MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None

Batch = dict[str, Any]


class Broken(AssertionError):
    """A condition does not hold; the first argument names it, in the same words for every model."""

    def __init__(self, what: str, details: str = ""):
        super().__init__(what, details)
        self.what, self.details = what, details


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradients and a fixed seed inside; then each module's own mode again."""
    modes = [(module, module.training) for module in model.modules()]
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model.eval()
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode


def outputs(model: nn.Module, batch: Batch) -> tuple[Tensor, ...]:
    """All floating-point outputs for the batch."""
    dtype = next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    batch = {name: value.to(dtype) if name == "pixel_values" else value for name, value in batch.items()}
    with evaluating(model):
        found, _ = call(lambda: model(**batch), "the forward pass", refuses=False)
    return tuple(tensor for tensor in found.to_tuple() if isinstance(tensor, Tensor))


def settings(model: nn.Module) -> dict[str, Any]:
    """Name of each quantizer -> its settings, without what is frozen."""
    return {
        name: {key: value for key, value in module.init_kwargs.items() if key != "name"}
        for name, module in model.named_modules()
        if isinstance(module, FakeQuantize)
    }


def rows(model: nn.Module) -> list[dict[str, Any]]:
    """The coverage report in plain values, without the reasons, which need not be in a file.

    Two of T5's embeddings are left out: after resizing they are the third one under another name.
    """
    return [
        {key: value for key, value in asdict(row).items() if key != "reason"}
        for row in coverage_report(model)
        if row.module not in ("encoder.embed_tokens", "decoder.embed_tokens")
    ]


@dataclass(frozen=True)
class Picture:
    """Everything that a failed call must not change."""

    state: dict[str, Tensor]
    classes: dict[str, type]
    settings: dict[str, Any]
    rows: list[dict[str, Any]]
    config: dict[str, Any]
    flags: dict[str, bool]
    modes: dict[str, bool]
    outputs: tuple[Tensor, ...]

    @classmethod
    def of(cls, model: PreTrainedModel, batch: Batch) -> Picture:
        return cls(
            state={name: value.detach().clone() for name, value in model.state_dict().items()},
            classes={name: type(module) for name, module in model.named_modules()},
            settings=settings(model),
            rows=rows(model),
            config=copy.deepcopy(model.config.to_dict()),
            flags={name: parameter.requires_grad for name, parameter in model.named_parameters()},
            modes={name: module.training for name, module in model.named_modules()},
            outputs=outputs(model, batch),
        )

    def difference(self, other: Picture) -> str:
        """The first difference and its place; empty if there is none."""
        for part in ("state", "classes", "settings", "config", "flags", "modes"):
            mine, others = getattr(self, part), getattr(other, part)
            for name in [*mine, *(name for name in others if name not in mine)]:
                if name not in mine or name not in others or not _same(mine[name], others[name]):
                    return f"{part}: {name}: {_short(mine.get(name))} is {_short(others.get(name))}"
        if self.rows != other.rows:
            return "coverage"
        return "" if same_outputs(self.outputs, other.outputs) else "outputs"


def same_outputs(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> bool:
    """Whether they are equal bit for bit."""
    return len(a) == len(b) and all(_same(*pair) for pair in zip(a, b, strict=True))


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    return a == b


def _short(value: Any) -> str:
    return f"{value.dtype}{list(value.shape)}" if isinstance(value, Tensor) else str(value)[:60]


def check_finite(found: tuple[Tensor, ...]) -> None:
    """No output may be NaN, or so large that it must come from memory that nothing was written to."""
    if any(not bool(tensor.isfinite().all()) or bool(tensor.abs().max() > 1e4) for tensor in found if tensor.numel()):
        raise Broken("outputs are NaN or huge")


def call(function: Callable[[], Any], what: str, *, refuses: bool = True) -> tuple[Any, Exception | None]:
    """The result of ``function`` or its refusal; ``Broken`` for other errors."""
    try:
        return function(), None
    except Broken:
        raise
    except Exception as error:
        if not refuses or not isinstance(error, REFUSALS) or not str(error).strip():
            raise Broken(f"{what} raised {type(error).__name__}", str(error)) from error
        return None, error


def saved_and_loaded(
    model: PreTrainedModel, batch: Batch, save: Callable[[str], Any] | None = None, *, is_empty: bool = True
) -> Picture:
    """Check that ``model`` comes back as it is, or cannot be saved; returns it as it is after saving.

    ``is_empty``: whether ``save`` writes into an empty folder.
    """
    found = outputs(model, batch)
    check_finite(found)
    with tempfile.TemporaryDirectory(dir=MEMORY) as parent:
        folder = Path(parent, "saved")
        _, error = call(lambda: (save or model.save_pretrained)(str(folder)), "save_pretrained")
        if error is not None and is_empty and folder.exists() and list(folder.iterdir()):
            raise Broken("save_pretrained raised after it had written", str(error))
        after = Picture.of(model, batch)
        if not same_outputs(found, after.outputs):
            raise Broken("save_pretrained changed the model's outputs")
        if error is not None:
            return after
        loaded, _ = call(lambda: type(model).from_pretrained(folder), "from_pretrained", refuses=False)
    came_back = outputs(loaded, batch)
    if not same_outputs(found, came_back):
        # Sums can have another order where a tensor of the file begins at an address that is no multiple of 64.
        came_back = outputs(copy.deepcopy(loaded), batch)
    if not same_outputs(found, came_back):
        differences = [(a - b).abs().max().item() for a, b in zip(found, came_back, strict=True) if a.shape == b.shape]
        raise Broken("other outputs after loading", f"differences {differences}")
    theirs = rows(loaded)
    if after.rows != theirs:
        different = [(a, b) for a, b in zip(after.rows, theirs, strict=False) if a != b]
        raise Broken("another coverage report after loading", str(different[:1] or (len(after.rows), len(theirs))))
    if loaded.dtype != model.dtype:
        raise Broken("another dtype after loading", f"{model.dtype} is {loaded.dtype}")
    return after
