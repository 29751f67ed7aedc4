"""Patterns for names of modules; they may come from an untrusted checkpoint, so their number is limited."""

import re
from collections.abc import Iterable
from fnmatch import translate
from functools import lru_cache

from .escaping import shown

_WILDCARDS = re.compile(r"[*?[]")
_MAX_LENGTH, _MAX_WILDCARDS = 500, 32  # of one pattern
_MAX_PATTERNS, _MAX_PATTERNS_WITH_WILDCARDS = 100_000, 1000  # of one field


class NamePatterns:
    """Shell-style patterns. Patterns without wildcards are looked up in a set, so there may be many.

    Args:
        patterns: each matches a module and everything below it, unless ``alone``.
        alone: whether each pattern matches only the module itself.
        anywhere: whether the last parts of a name are enough, as in PEFT.
    """

    def __init__(self, patterns: Iterable[str], *, alone: bool = False, anywhere: bool = False):
        self._alone = alone
        self._anywhere = anywhere
        patterns = dict.fromkeys(patterns)
        self._exact = {pattern for pattern in patterns if not _WILDCARDS.search(pattern)}
        wildcards = [pattern for pattern in patterns if pattern not in self._exact]
        self._wildcards = {p: [_compiled(p), *([_compiled(f"*.{p}")] if anywhere else [])] for p in wildcards}

    def matching(self, module_name: str) -> list[str]:
        """The patterns that match, those without wildcards first."""
        parts = module_name.split(".")
        ends = (len(parts),) if self._alone else range(1, len(parts) + 1)
        names = [".".join(parts[:end]) for end in ends]
        tails = [".".join(parts[begin:end]) for end in ends for begin in range(end if self._anywhere else 1)]
        found = [name for name in dict.fromkeys(tails) if name in self._exact]
        found += [
            pattern
            for pattern, matchers in self._wildcards.items()
            if any(matcher.match(name) for matcher in matchers for name in names)
        ]
        return found

    def by_pattern(self, module_names: Iterable[str]) -> dict[str, list[str]]:
        """Pattern -> names of the modules that it matches, for patterns that match any."""
        found: dict[str, list[str]] = {}
        for name in module_names if self._exact or self._wildcards else ():
            for pattern in self.matching(name):
                found.setdefault(pattern, []).append(name)
        return found


def matches(pattern: str, module_name: str) -> bool:
    """Whether ``pattern`` matches the module or a module that contains it."""
    return bool(NamePatterns([pattern]).matching(module_name))


def validate_patterns(patterns: Iterable[object], field: str) -> None:
    """Raise ``ValueError`` unless the patterns are strings, and few and short enough to be matched quickly."""
    patterns = list(patterns)
    wildcards = 0
    if len(patterns) > _MAX_PATTERNS:
        raise ValueError(f"{field} has {len(patterns)} name patterns; write at most {_MAX_PATTERNS}")
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise ValueError(f"{field}: a name pattern must be a string, got {shown(pattern)}")
        if len(pattern) > _MAX_LENGTH or len(_WILDCARDS.findall(pattern)) > _MAX_WILDCARDS:
            raise ValueError(
                f"{field}: the name pattern {shown(pattern)} has {len(pattern)} characters, of which "
                f"{len(_WILDCARDS.findall(pattern))} are wildcards; write at most {_MAX_LENGTH} characters and "
                f"{_MAX_WILDCARDS} wildcards"
            )
        wildcards += bool(_WILDCARDS.search(pattern))
    if wildcards > _MAX_PATTERNS_WITH_WILDCARDS:
        raise ValueError(
            f"{field} has {wildcards} name patterns with wildcards; write at most {_MAX_PATTERNS_WITH_WILDCARDS}, and "
            "full names instead of the others"
        )


@lru_cache(maxsize=4 * _MAX_PATTERNS_WITH_WILDCARDS)
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(translate(pattern))
