"""What the commands have in common."""

import os
from pathlib import Path
from typing import Any


def path(argument: str) -> Path:
    """The type of an argument that is a file or a folder."""
    return Path(os.path.expanduser(argument))


def display_name(folder: Path) -> str:
    """What a card calls a folder, which may be given as ``.``."""
    return Path(os.path.abspath(folder)).name


def sizes_in_words(facts: dict[str, Any]) -> str:
    """The sizes in a checkpoint's ``summary``."""
    stored, floating = facts["layer_bytes"], facts["layer_float32_bytes"]
    ratio = f", 1/{floating / stored:.2f} of float32" if stored else ""
    return f"quantized layers {stored:,} bytes{ratio}; files {facts['file_bytes']:,} bytes"
