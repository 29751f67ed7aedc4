"""Dataclasses to and from JSON."""

import math
import types
from dataclasses import asdict, fields, is_dataclass
from typing import Any, get_args, get_origin, get_type_hints


def to_plain(value: Any) -> Any:
    """Dataclasses as dicts, tuples as lists, and numbers that JSON lacks as the strings that ``float`` reads."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, dict):
        return {key: to_plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(part) for part in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def from_plain(kind: Any, value: Any) -> Any:
    """The value that ``to_plain`` wrote.

    Args:
        kind: its type: a dataclass, a list or a tuple of any length of one type, one of these or ``None``, or a type
            that JSON has.

    Raises:
        ValueError: a dataclass lacks a field or has an unknown one.
    """
    if is_dataclass(kind):
        known = [entry.name for entry in fields(kind)]
        if not isinstance(value, dict) or sorted(value) != sorted(known):
            raise ValueError(f"{getattr(kind, '__name__', kind)} must be an object with the fields {', '.join(known)}")
        hints = get_type_hints(kind)
        values: Any = {name: from_plain(hints[name], part) for name, part in value.items()}
        return kind(**values)  # type: ignore[operator]
    if get_origin(kind) is types.UnionType:
        return None if value is None else from_plain(get_args(kind)[0], value)
    if get_origin(kind) in (list, tuple):
        return get_origin(kind)(from_plain(get_args(kind)[0], part) for part in value)
    return float(value) if kind is float else value
