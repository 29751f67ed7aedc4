"""Writing a file atomically."""

import os
import tempfile
from pathlib import Path


def check_writable(path: Path) -> None:
    """Raise ``OSError`` if ``write_atomically`` could not write ``path``. Nothing is created."""
    place = next(folder for folder in path.absolute().parents if folder.exists())
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_atomically(path: Path, text: str) -> None:
    """Write ``text``, in UTF-8, to ``path``, which is replaced as a whole or, after an error, not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, since a file cannot be moved across file systems in one step.
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
