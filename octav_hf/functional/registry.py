"""Clipping rules by name."""

from collections.abc import Callable
from typing import TypeVar

from torch import Tensor

ClipRule = Callable[..., Tensor]
Rule = TypeVar("Rule", bound=ClipRule)

CLIP_RULES: dict[str, ClipRule] = {}
"""Name -> rule. A rule has the signature ``rule(x, num_bits, *, signed=True, dim=None, **options) -> clip``."""


def register_clip_rule(name: str) -> Callable[[Rule], Rule]:
    """Decorator: make a clipping rule known by ``name``, to the config too. A name that is taken raises."""

    def register(rule: Rule) -> Rule:
        if name in CLIP_RULES:
            raise ValueError(f"a clipping rule named {name!r} is already registered; choose another name")
        CLIP_RULES[name] = rule
        return rule

    return register
