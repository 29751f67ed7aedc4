"""A study's results: a file with one line of JSON for each finished cell."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

PACKAGES = ("octav-hf", "torch", "transformers", "datasets", "evaluate", "accelerate", "numpy")

Line = dict[str, Any]


def read_lines(path: Path) -> list[Line]:
    """The lines of a results file, in its order; none if there is no file.

    A last line that is cut off, as a killed study may leave it, is not a finished cell, and left out.

    Raises:
        ValueError: another line is not JSON.
    """
    if not path.is_file():
        return []
    *whole, _ = path.read_text(encoding="utf-8").split("\n")
    lines = []
    for number, text in enumerate(whole, 1):
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number} is not JSON ({error}). Remove that line.") from error
    return lines


def append_line(path: Path, line: Line) -> None:
    """Add a finished cell, in the place of a last line that is cut off."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        file.seek(0)
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)
        file.write(json.dumps(line).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def environment(folder: Path, threads: str, jobs: int) -> dict[str, Any]:
    """Where and with what a cell runs.

    Args:
        folder: of this script, for the git commit; the commit ends in "+" if files differ from it, and is None where
            there is no repository.
        threads: CPU threads of the run.
        jobs: runs at a time.
    """
    return {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "commit": _commit(folder),
        "hardware": {
            "machine": platform.machine(),
            "cpus": os.cpu_count(),
            "threads": threads,
            "jobs": jobs,
            "accelerator": _accelerator(),
        },
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # octav_hf from a source tree that is not installed
        return None


def _commit(folder: Path) -> str | None:
    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=folder, check=True, capture_output=True, text=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _accelerator() -> str | None:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None
