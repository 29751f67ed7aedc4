"""Text that somebody else may have written, for messages, terminals and model cards.

What a checkpoint says may hold control characters, Markdown or HTML, and be of any length.
"""

import re
import reprlib
from typing import Any

_LONGEST = 200  # characters of one name or value in a message
_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = _repr.maxlong = _LONGEST
_repr.maxdict = _repr.maxlist = _repr.maxtuple = _repr.maxset = 8


def shown(value: Any) -> str:
    """The ``repr`` of ``value``, shortened where it is long."""
    try:
        return _repr.repr(value)
    except ValueError:  # an integer of more digits than Python writes
        return f"an integer of {value.bit_length()} bits" if isinstance(value, int) else f"a {type(value).__name__}"


def escaped(text: str, longest: int | None = _LONGEST) -> str:
    """``text`` with Python's escapes for what is not printable, such as line ends and commands to a terminal.

    ``longest``: the number of characters after which it is cut off; ``None`` for no limit.
    """
    if longest is not None and len(text) > longest:
        text = f"{text[:longest]}..."
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


def markdown_code(text: object) -> str:
    """``text`` as a code span of one line, in a table too."""
    code = escaped(str(text)).replace("`", "'").replace("|", "\\|")
    return f"`{code}`"


def markdown_text(text: object) -> str:
    """``text`` as one line of text without Markdown, HTML or links; an underscore inside a word is none."""
    line = re.sub(r"([\\`*<>\[\]|~@])", r"\\\1", escaped(str(text), longest=None))
    return line.replace("://", ":\\//").replace("www.", "www\\.")
