"""Escape untrusted text for messages, terminals and model cards.

Strings in a checkpoint may contain control characters, Markdown or HTML, and have any length.
"""

import re
import reprlib
from typing import Any

_LONGEST = 200  # characters of one name or value in a message
_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = _repr.maxlong = _LONGEST
_repr.maxdict = _repr.maxlist = _repr.maxtuple = _repr.maxset = 8


def shown(value: Any) -> str:
    """The ``repr`` of ``value``, shortened if it is long."""
    try:
        return _repr.repr(value)
    except ValueError:  # an integer with more digits than Python converts
        return f"an integer of {value.bit_length()} bits" if isinstance(value, int) else f"a {type(value).__name__}"


def escaped(text: str, longest: int | None = _LONGEST) -> str:
    """``text`` with Python's escapes for unprintable characters, such as newlines and terminal control sequences.

    Args:
        longest: number of characters after which it is truncated; ``None`` for no limit.
    """
    if longest is not None and len(text) > longest:
        text = f"{text[:longest]}..."
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


def markdown_code(text: object) -> str:
    """``text`` as a Markdown code span in one line, also valid in a table."""
    code = escaped(str(text)).replace("`", "'").replace("|", "\\|")
    return f"`{code}`"


def markdown_text(text: object) -> str:
    """``text`` as one line without active Markdown, HTML or links; underscores inside words are not Markdown."""
    line = re.sub(r"([\\`*<>\[\]|~@])", r"\\\1", escaped(str(text), longest=None))
    return line.replace("://", ":\\//").replace("www.", "www\\.")
