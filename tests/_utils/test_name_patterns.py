"""Patterns match like a plain reference; patterns that would take too long are refused."""

import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from octav_hf import OctavConfig
from octav_hf._utils import name_patterns
from octav_hf._utils.name_patterns import NamePatterns, matches

parts = st.sampled_from(["a", "b", "ab", "0", "query"])
names = st.lists(parts, min_size=1, max_size=4).map(".".join)
patterns = st.lists(st.sampled_from(["a", "b", ".", "*", "?", "query", "0", ".*", "[ab]"]), max_size=8).map("".join)


def glob(pattern: str, text: str) -> bool:
    """Whether the shell-style pattern matches all of ``text``, by recursion on its first character."""
    if not pattern:
        return not text
    if pattern[0] == "*":
        return glob(pattern[1:], text) or (text != "" and glob(pattern, text[1:]))
    allowed, rest = ("ab", pattern[4:]) if pattern.startswith("[ab]") else (pattern[0], pattern[1:])
    return text != "" and (allowed == "?" or text[0] in allowed) and glob(rest, text[1:])


def heads(name: str) -> list[str]:
    return [".".join(name.split(".")[:end]) for end in range(1, name.count(".") + 2)]


@settings(max_examples=200, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(st.lists(patterns | names, max_size=3), names)
def test_what_matches(wanted: list[str], name: str) -> None:
    below = [pattern for pattern in wanted if any(glob(pattern, head) for head in heads(name))]
    assert sorted(NamePatterns(wanted).matching(name)) == sorted(set(below))
    alone = [pattern for pattern in wanted if glob(pattern, name)]
    assert sorted(NamePatterns(wanted, alone=True).matching(name)) == sorted(set(alone))
    last = {p for p in wanted if any(glob(each, head) for each in (p, f"*.{p}") for head in heads(name))}
    assert set(NamePatterns(wanted, anywhere=True).matching(name)) == last
    for pattern in wanted:
        assert matches(pattern, name) is (pattern in below)


def test_full_names_are_looked_up_and_patterns_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []
    monkeypatch.setattr(name_patterns, "translate", lambda pattern: compiled.append(pattern) or re.escape(pattern))
    many = [f"layer.{index}" for index in range(20_000)]
    overrides: dict = {name: {} for name in many}
    config = OctavConfig(exclude_modules=many, target_modules=[*many, "only-here.*"], module_overrides=overrides)
    modules = [f"layer.{index}.dense" for index in range(10_000, 30_000)]
    assert sum(reason.startswith("excluded") for reason in config.left_out(modules).values()) == 10_000
    assert len(config.settings_for(modules)) == 20_000
    assert sorted(compiled) == ["*.only-here.*", "only-here.*"]


@pytest.mark.parametrize("field", ["exclude_modules", "target_modules", "attention_modules", "module_overrides"])
def test_bounds(field: str) -> None:
    def config(*patterns: object) -> OctavConfig:
        of_all = {pattern: {} for pattern in patterns} if field == "module_overrides" else list(patterns)
        return OctavConfig(**{field: of_all})

    config("*a" * 32, "a" * 500, *(f"{index}*" for index in range(998)))
    for refused, message in (
        (["*a" * 33], f"{field}: the name pattern .* has 66 characters, of which 33 are wildcards; write at most 500"),
        (["a" * 501], f"{field}: the name pattern 'a+\\.\\.\\.a+' has 501 characters"),
        ([f"{index}*" for index in range(1001)], f"{field} has 1001 name patterns with wildcards; write at most 1000"),
        (map(str, range(100_001)), f"{field} has 100001 name patterns; write at most 100000"),
        ([3], f"{field}: a name pattern must be a string, got 3"),
    ):
        with pytest.raises(ValueError, match=message):
            config(*refused)


def test_a_name_that_backtracking_would_not_finish() -> None:
    """With backtracking, many ``*`` would take exponential time; the regexes are atomic."""
    assert not matches("*a" * 32 + "*b", "a" * 200)
