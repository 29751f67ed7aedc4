"""Progress bars: when they appear, and when they must not."""

import io
import sys
from collections.abc import Iterator

import pytest
import tqdm.std
from torch import distributed
from transformers.utils import logging

from octav_hf._utils.progress import progress
from octav_hf.cli import main, publish


class Clock:
    """Stands for ``time.time`` in tqdm."""

    seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(tqdm.std, "time", clock)
    monkeypatch.setattr(tqdm.std.tqdm, "monitor_interval", 0)  # its thread waits by the real clock
    return clock


def work(clock: Clock, description: str = "working", seconds: float = 1.0) -> None:
    for _ in progress(range(4), description):
        clock.seconds += seconds


@pytest.mark.parametrize(("seconds", "shown"), [(0.4, False), (1.0, True)])
def test_appears_after_two_seconds(clock: Clock, capsys: pytest.CaptureFixture, seconds: float, shown: bool) -> None:
    work(clock, "packing weights", seconds)
    written = capsys.readouterr()
    assert ("packing weights: 100%" in written.err) is shown
    assert written.out == ""
    assert shown or written.err == ""


def test_a_step_that_takes_long_is_announced(clock: Clock, capsys: pytest.CaptureFixture) -> None:
    with progress(None, "exporting", total=1) as bar:
        assert capsys.readouterr().err == ""
        bar.set_description("exporting: translating")
        assert "exporting: translating:   0%" in capsys.readouterr().err
        clock.seconds += 5
        bar.update()
    assert "exporting: translating: 100%" in capsys.readouterr().err


def generator() -> Iterator[int]:
    yield from range(3)


def test_passes_on_what_it_loops_over() -> None:
    assert list(progress(generator(), "working", total=3)) == [0, 1, 2]


@pytest.fixture
def bars_off() -> Iterator[None]:
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


@pytest.mark.usefixtures("bars_off")
def test_is_turned_off_with_the_bars_of_transformers(clock: Clock, capsys: pytest.CaptureFixture) -> None:
    work(clock)
    with progress(None, "exporting", total=1) as bar:
        bar.set_description("exporting: translating")
        clock.seconds += 5
        bar.update()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("has_group", [False, True])
@pytest.mark.parametrize("rank", [0, 1])
def test_only_the_first_process_shows_it(
    clock: Clock, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, rank: int, has_group: bool
) -> None:
    monkeypatch.setenv("RANK", str(1 - rank) if has_group else str(rank))  # what the process group says counts
    monkeypatch.setattr(distributed, "is_initialized", lambda: has_group)
    monkeypatch.setattr(distributed, "get_rank", lambda: rank)
    work(clock)
    assert ("working: 100%" in capsys.readouterr().err) is (rank == 0)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("stderr", [io.StringIO(), Terminal()], ids=["file", "terminal"])
def test_commands_show_it_in_a_terminal(clock: Clock, monkeypatch: pytest.MonkeyPatch, stderr: io.StringIO) -> None:
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setattr(publish, "_card", lambda options: work(clock))
    assert main(["card", "folder"]) == 0
    assert ("working: 100%" in stderr.getvalue()) is stderr.isatty()
    assert logging.is_progress_bar_enabled()
