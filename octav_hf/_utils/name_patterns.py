"""Patterns for the names of modules, which a checkpoint may bring in any number."""

import re
from collections.abc import Iterable
from fnmatch import translate
from functools import lru_cache

from .escaping import shown

_WILDCARDS = re.compile(r"[*?[]")
_MAX_LENGTH, _MAX_WILDCARDS = 500, 32  # of one pattern
_MAX_PATTERNS, _MAX_PATTERNS_WITH_WILDCARDS = 100_000, 1000  # of one field


class NamePatterns:
    """Shell-style patterns; one without wildcards is looked up, however many there are of them.

    Args:
        patterns: each for a module and everything below it, unless ``alone``.
        alone: each for one module.
        anywhere: the last parts of a name are enough, as in PEFT.
    """

    def __init__(self, patterns: Iterable[str], *, alone: bool = False, anywhere: bool = False):
        self._alone = alone
        self._anywhere = anywhere
        patterns = dict.fromkeys(patterns)
        self._exact = {pattern for pattern in patterns if not _WILDCARDS.search(pattern)}
        wildcards = [pattern for pattern in patterns if pattern not in self._exact]
        self._wildcards = {p: [_compiled(p), *([_compiled(f"*.{p}")] if anywhere else [])] for p in wildcards}

    def matching(self, module_name: str) -> list[str]:
        """Those that match, first the ones without wildcards."""
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
        """Those that match at least one of the modules -> the names that each matches."""
        found: dict[str, list[str]] = {}
        for name in module_names if self._exact or self._wildcards else ():
            for pattern in self.matching(name):
                found.setdefault(pattern, []).append(name)
        return found


def matches(pattern: str, module_name: str) -> bool:
    """Whether ``pattern`` names the module or one of those that contain it."""
    return bool(NamePatterns([pattern]).matching(module_name))


def validate_patterns(patterns: Iterable[object], field: str) -> None:
    """Raise ``ValueError`` unless these are strings, no more and no longer than a matching of names can take."""
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
                f"{len(_WILDCARDS.findall(pattern))} are wildcards; write at most {_MAX_LENGTH}, and {_MAX_WILDCARDS} "
                "wildcards"
            )
        wildcards += bool(_WILDCARDS.search(pattern))
    if wildcards > _MAX_PATTERNS_WITH_WILDCARDS:
        raise ValueError(
            f"{field} has {wildcards} name patterns with wildcards; write at most {_MAX_PATTERNS_WITH_WILDCARDS}, and "
            "full names of modules for the others"
        )


@lru_cache(maxsize=4 * _MAX_PATTERNS_WITH_WILDCARDS)
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(translate(pattern))
