"""Writing a folder atomically."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

UNFINISHED = ".octav-hf-unfinished-"
"""Prefix of the names of temporary folders."""


@contextmanager
def atomic_output_dir(output: Path) -> Iterator[Path]:
    """Context that yields a temporary folder, whose content is moved to ``output`` at the end.

    If ``output`` does not exist, it appears with all its files at once. If it is an empty folder or a link to one, the
    files are moved into it, ``config.json`` last. After an error, or if another run was faster, ``output`` is
    unchanged. Leftovers of killed runs are ignored.

    Raises:
        FileExistsError: ``output`` exists and is not an empty folder, at the beginning or at the end.
        OSError: ``output`` cannot be written.
    """
    folder = Path(os.path.realpath(output))
    is_new = not folder.exists()
    _check_empty(folder, output)
    # In the folder itself if it exists, because its parent may be read-only or on another file system; otherwise in the
    # nearest existing parent.
    place = next(parent for parent in (folder, *folder.parents) if parent.exists())
    with tempfile.TemporaryDirectory(prefix=UNFINISHED, dir=place) as temporary:
        unfinished = Path(temporary, folder.name or "output")
        unfinished.mkdir()  # with default permissions, unlike the temporary folder
        yield unfinished
        _check_empty(folder, output)
        try:
            if is_new:
                folder.parent.mkdir(parents=True, exist_ok=True)
                unfinished.rename(folder)
            else:
                _move_files(unfinished, folder)
        except OSError:
            _check_empty(folder, output)
            raise


def _check_empty(folder: Path, output: Path) -> None:
    if not folder.exists():
        return
    if not folder.is_dir() or any(not path.name.startswith(UNFINISHED) for path in folder.iterdir()):
        raise FileExistsError(f"{output} already exists; choose another output")


def _move_files(source: Path, target: Path) -> None:
    """Move the content of ``source`` into the empty folder ``target``; after an error, ``target`` is empty again."""
    last = target / "config.json"
    moved = []
    last.touch(exist_ok=False)  # succeeds in only one of two concurrent runs
    try:
        for path in source.iterdir():
            if path.name != last.name:
                moved.append(target / path.name)
                path.rename(target / path.name)
        if (source / last.name).exists():
            (source / last.name).replace(last)
        else:
            last.unlink()
    except BaseException:
        for path in (*moved, last):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        raise
