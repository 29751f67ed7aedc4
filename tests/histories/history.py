"""Drawing, running, printing and shortening histories."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
import transformers

from .check import Broken, Picture, call
from .models import KINDS
from .steps import ACTIONS, PACKAGE_CALLS, Subject

MAX_STEPS = 6


class Step:
    """One step: the name of its function in ``steps``, and arguments."""

    def __init__(self, name: str, **arguments: Any):
        self.name, self.arguments = name, arguments

    def __repr__(self) -> str:
        arguments = "".join(f", {name}={value!r}" for name, value in self.arguments.items())
        return f'Step("{self.name}"{arguments})'


@dataclass(frozen=True)
class Failure:
    """The condition that did not hold, and the step and history."""

    history: History
    what: str
    details: str

    @property
    def kind(self) -> str:
        """Equal for failures that probably have the same cause."""
        message = re.sub(r"\d+|'[^']*'|\S+\.\S+", "…", self.details)[:90]
        return f"{self.what} [{self.history.steps[-1].name if self.history.steps else ''}] {message}"

    def __str__(self) -> str:
        return f"{self.what}: {self.details}\n{self.history!r}.run()"


class History:
    """Steps on a model of one of the ``KINDS``."""

    def __init__(self, kind: str, *steps: Step):
        self.kind, self.steps = kind, steps

    def __repr__(self) -> str:
        return f'History("{self.kind}"{"".join(f", {step!r}" for step in self.steps)})'

    @classmethod
    def drawn(cls, number: int, seed: int = 0) -> History:
        """The history with this number; always the same."""
        random = Random(f"{seed} {number}")
        kind = random.choice(list(KINDS))
        names, weights = list(ACTIONS), [each.weight for each in ACTIONS.values()]
        chosen = random.choices(names, weights, k=random.randint(1, MAX_STEPS))
        if random.random() < 0.8 and "apply" not in chosen[:2]:
            chosen[0] = "apply"
        return cls(kind, *(Step(name, **ACTIONS[name].draw(random, KINDS[kind])) for name in chosen))

    def run(self) -> Counts:
        """Take the steps with the check after each; ``Broken`` if one fails."""
        with _quiet():
            return self._run()

    def _run(self) -> Counts:
        kind, counts = KINDS[self.kind], Counts()
        model = kind.make()
        subject = Subject(kind, model, model)
        subject.earlier.append(subject.picture())
        for number, step in enumerate(self.steps, 1):
            before = subject.earlier[-1]
            torch.manual_seed(number)
            _, error = call(lambda s=step: ACTIONS[s.name].run(subject, **s.arguments), step.name)
            if error is not None:
                counts.refused += 1
                if step.name in PACKAGE_CALLS and not _raised_here(error):
                    raise Broken(f"{step.name} raised an error that is not the package's", repr(error))
                difference = before.difference(subject.picture())
                if difference:
                    raise Broken(f"{step.name} raised and changed the model", f"{difference} ({error})")
                continue
            counts.done += 1
            subject.earlier.append(subject.check_saving(subject.model))
        for what, other, was in subject.others:
            config = other.config.to_dict() | {"quantization_config": was.config.get("quantization_config")}
            if what == "a model of the same config" and config != was.config:
                continue  # resizing changes the config that both have
            difference = was.difference(Picture.of(other, subject.batch))
            if difference:
                raise Broken(f"{what} was changed by later steps", difference)
            subject.check_saving(other)
        return counts

    def failure(self) -> Failure | None:
        """Run the history; returns the failure with the steps up to it."""
        try:
            self.run()
        except Broken as broken:
            return Failure(self, broken.what, broken.details)
        return None

    def shortened(self) -> Failure | None:
        """A failure of the same kind with fewer steps and arguments."""
        found = self.failure()
        if found is None:
            return None
        smaller = True
        while smaller:
            smaller = False
            for history in found.history._smaller():
                failure = history.failure()
                if failure is not None and failure.what == found.what:
                    found, smaller = failure, True
                    break
        return found

    def _smaller(self) -> Iterator[History]:
        if self.kind != "bert":
            yield History("bert", *self.steps)
        for i in reversed(range(len(self.steps))):
            yield History(self.kind, *self.steps[:i], *self.steps[i + 1 :])
        for i, step in enumerate(self.steps):
            for name in step.arguments:
                rest = {other: value for other, value in step.arguments.items() if other != name}
                yield History(self.kind, *self.steps[:i], Step(step.name, **rest), *self.steps[i + 1 :])


@dataclass
class Counts:
    """Number of steps that succeeded, and number of refused steps."""

    done: int = 0
    refused: int = 0


def _raised_here(error: Exception) -> bool:
    """Whether the package or the history itself raised the error."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and any(part in trace.tb_frame.f_code.co_filename for part in ("octav_hf", "histories"))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without logs and progress bars."""
    level, disabled = transformers.logging.get_verbosity(), logging.root.manager.disable
    bars = transformers.logging.is_progress_bar_enabled()
    transformers.logging.disable_progress_bar()
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)
        logging.disable(disabled)
        if bars:
            transformers.logging.enable_progress_bar()
