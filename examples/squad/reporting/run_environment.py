"""The environment of a result: versions, commit, hardware."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import octav_hf

PACKAGES = ("torch", "transformers", "datasets", "evaluate", "accelerate", "numpy", "matplotlib")


def environment(threads: int | str, jobs: int = 1) -> dict[str, Any]:
    """For JSON: `versions`, `commit` and `hardware`.

    The commit is that of this file's repository, with a "+" if files differ from it; None outside a repository.

    Args:
        threads: CPU threads of the run.
        jobs: number of runs at a time.
    """
    packages = {package: importlib.metadata.version(package) for package in PACKAGES}
    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    hardware = {"machine": platform.machine(), "cpus": os.cpu_count(), "threads": threads, "jobs": jobs}
    return {
        "versions": {"python": platform.python_version(), "octav-hf": octav_hf.__version__, **packages},
        "commit": _commit(),
        "hardware": {**hardware, "accelerator": accelerator},
    }


def _commit() -> str | None:
    def git(*words: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
