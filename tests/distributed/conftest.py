"""Scenarios in real processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]

Run = Callable[..., list[Any]]


@pytest.fixture(scope="session")
def host() -> Iterator[subprocess.Popen[str]]:
    """The process that forks ranks; see ``host.py``."""
    command = [sys.executable, "-m", "tests.distributed.host"]
    # Compiled code would be loaded anew in each rank, for tensors that are too small to profit.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OCTAV_HF_COMPILE": "0", "MASTER_ADDR": "127.0.0.1"}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    yield process
    process.communicate()


@pytest.fixture
def run(host: subprocess.Popen[str], tmp_path: Path) -> Run:
    """A function that runs a scenario on several ranks and returns the result, or the error as a string, of each."""

    def run_scenario(scenario: str, ranks: int, folder: Path | None = None, **options: Any) -> list[Any]:
        folder = folder or tmp_path / f"{scenario}_{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        request = {"scenario": scenario, "ranks": ranks, "folder": str(folder), "options": options}
        host.stdin.write(json.dumps(request) + "\n")
        host.stdin.flush()
        answer = host.stdout.readline().split()
        while answer and answer[0] != "codes":  # what libraries print
            answer = host.stdout.readline().split()
        assert answer == ["codes"] + ["0"] * ranks, "a rank died, by itself or after its time limit (-14)"
        return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(ranks)]

    return run_scenario


@pytest.fixture
def succeed(run: Run) -> Run:
    """``run`` for scenarios in which no rank may raise an error."""

    def run_without_error(*arguments: Any, **options: Any) -> list[Any]:
        outcomes = run(*arguments, **options)
        errors = [outcome for outcome in outcomes if isinstance(outcome, str)]
        assert not errors, "\n".join(errors)
        return outcomes

    return run_without_error
