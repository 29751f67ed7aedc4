"""Clipping rules by name."""

import inspect
from collections.abc import Callable
from typing import TypeVar

from torch import Tensor

ClipRule = Callable[..., Tensor]
Rule = TypeVar("Rule", bound=ClipRule)

CLIP_RULES: dict[str, ClipRule] = {}
"""Name -> rule. A rule has the signature ``rule(x, num_bits, *, signed=True, dim=None, **options) -> clip``.

One that can compute the clip of a tensor that is spread over several ranks also has ``ranks: AllRanks | None = None``.
"""

RULE_ARGUMENTS = ("x", "num_bits", "signed", "dim", "ranks")
"""What is no option of a rule."""


def rules_for_all_ranks() -> list[str]:
    """The names of the rules that take ``ranks``."""
    return sorted(name for name, rule in CLIP_RULES.items() if "ranks" in inspect.signature(rule).parameters)


def register_clip_rule(name: str) -> Callable[[Rule], Rule]:
    """Decorator: make a clipping rule known by ``name``, to the config too. A name that is taken raises."""

    def register(rule: Rule) -> Rule:
        if name in CLIP_RULES:
            raise ValueError(f"a clipping rule named {name!r} is already registered; choose another name")
        CLIP_RULES[name] = rule
        return rule

    return register
