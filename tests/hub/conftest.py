"""Fixtures: the hub, its users, and processes that talk to it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from .loopback_hub import LoopbackHub, User, running

ROOT = Path(__file__).parents[2]

# Made-up tokens.
ADA, ADA_READING, BOB = "hf_ada", "hf_ada_reads", "hf_bob"
USERS = {ADA: User("ada"), ADA_READING: User("ada", may_write=False), BOB: User("bob")}


@pytest.fixture(scope="module")
def hub() -> Iterator[LoopbackHub]:
    """A hub with the users ada and bob."""
    with running(dict(USERS)) as hub:
        yield hub


def run_script(
    hub: LoopbackHub, home: Path, script: str, *arguments: object, token: str | None = None, check: bool = True
) -> subprocess.CompletedProcess[str]:
    """Run a Python script in a separate process that knows only this hub.

    Args:
        hub: where the client pushes to and loads from.
        home: folder of the client's cache; an empty one knows nothing.
        script, arguments: for ``python -c``.
        token: who the client is; None: nobody.
        check: whether a failure of the script is one of the test.
    """
    kept = {name: value for name, value in os.environ.items() if not name.upper().endswith("_PROXY")}
    hugging_face = ("HF_", "HUGGING_FACE_", "HUGGINGFACE_", "TRANSFORMERS_")
    environment = {name: value for name, value in kept.items() if not name.startswith(hugging_face)} | {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "OMP_NUM_THREADS": "1",
    }
    if token is not None:
        environment["HF_TOKEN"] = token
    command = [sys.executable, "-c", script, *map(str, arguments)]
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert process.returncode == 0 or not check, process.stderr
    return process
