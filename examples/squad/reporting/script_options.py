"""Options of the scripts that measure clips; defaults are set late, to know which options were given."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from typing import Any


def refuse_given(parser: argparse.ArgumentParser, options: argparse.Namespace, names: Iterable[str], why: str) -> None:
    """End the program if one of these options is given, because it would be ignored; `why` completes the message."""
    given = [f"--{name}" for name in names if getattr(options, name) is not None]
    if given:
        parser.error(f"{', '.join(given)} would be ignored{why}")


def fill_in(
    parser: argparse.ArgumentParser, options: argparse.Namespace, defaults: Mapping[str, Any], counts: Iterable[str]
) -> None:
    """Set defaults of options that were not given; end the program unless each of `counts` is at least 1."""
    for name, default in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, default)
    for name in counts:
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1, not {getattr(options, name)}")
