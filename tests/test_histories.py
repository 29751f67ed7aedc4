"""Random histories of models: after each step the model is unchanged, or is saved and restored correctly."""

from __future__ import annotations

import os

import pytest

pytest.importorskip("peft", reason="pip install --no-deps peft")

from .histories import History
from .histories.models import KINDS
from .histories.steps import ACTIONS

COUNT = int(os.environ.get("OCTAV_HF_HISTORIES", "500"))
FIRST, PARTS = 20, 10


@pytest.mark.parametrize(
    "numbers",
    [
        pytest.param(range(FIRST), marks=[pytest.mark.slow, pytest.mark.versions], id="first"),
        *(pytest.param(range(FIRST + i, COUNT, PARTS), marks=pytest.mark.slow, id=str(i)) for i in range(PARTS)),
    ],
)
def test_a_model_comes_back_as_it_is_whatever_was_done_to_it(numbers: range) -> None:
    failed = [history for number in numbers if (history := History.drawn(number)).failure()]
    shortest = [str(history.shortened()) for history in failed[:2]]
    assert not failed, "\n\n".join([f"{len(failed)} histories failed, such as", *shortest])


def test_histories_are_the_same_each_time_and_have_every_step() -> None:
    drawn = [History.drawn(number) for number in range(500)]
    assert list(map(repr, drawn)) == [repr(History.drawn(number)) for number in range(500)]
    assert {step.name for history in drawn for step in history.steps} == set(ACTIONS)
    assert {history.kind for history in drawn} == set(KINDS)
