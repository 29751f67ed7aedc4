"""The progress bar of everything that may take longer than two seconds."""

import os
from collections.abc import Iterable
from typing import Any

from torch import distributed
from transformers.utils.logging import tqdm

_DELAY = 2  # seconds; what is done before shows no bar


def progress(iterable: Iterable[Any] | None, description: str, total: int | None = None) -> Any:
    """``iterable`` with a progress bar on stderr, which appears once the loop has run for two seconds.

    ``transformers.utils.logging.disable_progress_bar()`` turns it off. Of several processes only the first one shows a
    bar.

    Args:
        iterable: what to loop over; ``None`` for a bar in a ``with`` statement, which ``update()`` moves on.
        description: what is being done, such as ``"calibrating"``.
        total: number of steps, where ``iterable`` has no ``len``.

    Returns:
        A ``tqdm`` object. Its ``set_description("…")`` shows the bar at once; use it before a step that is known to
        take long.
    """
    return tqdm(iterable, desc=description, total=total, delay=_DELAY, disable=not _is_main_process())


def _is_main_process() -> bool:
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank() == 0
    return os.environ.get("RANK", "0") == "0"  # which launchers set before there is a process group
