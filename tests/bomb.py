"""A pickle that shows whether it has been unpickled."""

from __future__ import annotations

from pathlib import Path
from typing import Any


class Bomb:
    """Unpickling it leaves a trace."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.trace,)
