"""Writing a folder atomically."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

UNFINISHED = ".octav-hf-unfinished-"
"""Begins the name of a temporary folder."""


@contextmanager
def atomic_output_dir(output: Path) -> Iterator[Path]:
    """A temporary folder, of this run alone, whose content becomes that of ``output`` at the end.

    An ``output`` that does not exist appears with all its files at once. An empty folder, or a link to one, stays the
    folder that it is: the files are moved into it, ``config.json`` last. After an error, or if another run was faster,
    ``output`` is as it was. What a killed run leaves behind is ignored.

    Raises:
        FileExistsError: ``output`` exists and is not an empty folder, at the beginning or at the end.
        OSError: it cannot be written.
    """
    folder = Path(os.path.realpath(output))
    is_new = not folder.exists()
    _check_empty(folder, output)
    # In the folder itself, whose parent may be read-only or another file system; otherwise in the nearest parent.
    place = next(parent for parent in (folder, *folder.parents) if parent.exists())
    with tempfile.TemporaryDirectory(prefix=UNFINISHED, dir=place) as temporary:
        unfinished = Path(temporary, folder.name or "output")
        unfinished.mkdir()  # with the permissions of any new folder, which the temporary one has not
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
        raise FileExistsError(f"{output} exists already; choose another output")


def _move_files(source: Path, target: Path) -> None:
    """Move what is in ``source`` into the empty folder ``target``; all or, after an error, nothing."""
    last = target / "config.json"
    moved = []
    last.touch(exist_ok=False)  # of two runs one gets past this
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
