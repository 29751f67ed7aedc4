"""The subject of a history, and the registry of steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

import peft
from torch import nn
from transformers import PreTrainedModel

from octav_hf import OctavConfig
from octav_hf.nn import QuantizedAttention, QuantizedLayer

from .check import Picture, saved_and_loaded
from .models import Kind

Arguments = dict[str, Any]


def has_adapters(model: nn.Module) -> bool:
    """Whether PEFT has put adapters into the model."""
    kinds = peft.tuners.tuners_utils.BaseTunerLayer, peft.utils.ModulesToSaveWrapper
    return any(isinstance(module, kinds) for module in model.modules())


@dataclass
class Subject:
    """The subject of a history.

    Attributes:
        model: the Transformers model.
        outer: what is around it, or the model itself.
        config: of the last ``apply``.
        earlier: the model after the steps until now, for resuming.
        others: models that no further step changes, with what they were.
    """

    kind: Kind
    model: PreTrainedModel
    outer: nn.Module
    config: OctavConfig | None = None
    earlier: list[Picture] = field(default_factory=list)
    others: list[tuple[str, PreTrainedModel, Picture]] = field(default_factory=list)

    def check_saving(self, model: PreTrainedModel) -> Picture:
        """Save and load ``model``; a model with adapters and without quantized modules is left out."""
        quantized = any(isinstance(module, QuantizedLayer | QuantizedAttention) for module in model.modules())
        if has_adapters(model) and not quantized:
            return Picture.of(model, self.batch)
        return saved_and_loaded(model, self.batch)

    @property
    def batch(self) -> Arguments:
        """Whatever dtype the model has: `outputs` casts images."""
        return self.kind.batch(0)

    def picture(self) -> Picture:
        return Picture.of(self.model, self.batch)

    def named(self, on: str) -> nn.Module:
        """The part of the subject that a step is about."""
        if on == "outer":
            return self.outer
        if on == "head":
            return self.model.get_submodule(self.kind.head)
        if on == "part":
            return self.model.get_submodule(self.path("part"))
        return self.model if on == "model" else self.model.base_model

    def path(self, on: str) -> str:
        """The name of a part: the head, or the largest child of the base model."""
        if on == "head":
            return self.kind.head
        part = max(self.model.base_model.children(), key=lambda child: len(list(child.modules())))
        return next(name for name, module in self.model.named_modules() if module is part)

    def set_model(self, model: PreTrainedModel) -> None:
        self.model = self.outer = model


@dataclass(frozen=True)
class Action:
    """A kind of step: what it does, and how its arguments are drawn."""

    run: Callable[..., None]
    draw: Callable[[Random, Kind], Arguments]
    weight: int


ACTIONS: dict[str, Action] = {}

PACKAGE_CALLS = ("apply", "calibrate", "uncalibrate", "pack", "unpack", "remove")
"""The steps whose errors must be the package's own."""


def action(
    weight: int = 1, draw: Callable[[Random, Kind], Arguments] | None = None, **choices: list[Any]
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorator: register a function of a subject and of arguments, which are drawn from choices.

    Arguments that are the first choice are left out, so that what is printed is short.
    """

    def register(function: Callable[..., None]) -> Callable[..., None]:
        def drawn(random: Random, kind: Kind) -> Arguments:
            values = {name: random.choice(of) for name, of in choices.items()}
            short = {name: value for name, value in values.items() if value != choices[name][0]}
            return short | (draw(random, kind) if draw else {})

        ACTIONS[function.__name__] = Action(function, drawn, weight)
        return function

    return register
