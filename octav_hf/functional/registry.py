"""Clipping rules by name."""

import inspect
from collections.abc import Callable
from typing import TypeVar

from torch import Tensor

ClipRule = Callable[..., Tensor]
Rule = TypeVar("Rule", bound=ClipRule)

CLIP_RULES: dict[str, ClipRule] = {}
"""Name -> ``rule(x, num_bits, *, signed=True, dim=None, **options) -> clip``.

Rules that support a tensor distributed over several ranks also take ``ranks: AllRanks | None = None``.
"""

OPTION_CHECKS: dict[str, Callable[..., None]] = {}
"""Name -> ``check(**options)``, which raises ``ValueError`` for options that the rule refuses; needs no tensor."""

RULE_ARGUMENTS = ("x", "num_bits", "signed", "dim", "ranks")
"""Arguments of rules that are not options."""


def rules_for_all_ranks() -> list[str]:
    return sorted(name for name, rule in CLIP_RULES.items() if "ranks" in inspect.signature(rule).parameters)


def register_clip_rule(name: str, *, check_options: Callable[..., None] | None = None) -> Callable[[Rule], Rule]:
    """Decorator: register a clipping rule under ``name``, for the config too; ``ValueError`` if it is taken.

    Options come from checkpoints too, which anybody may have written, so a rule has to refuse those that would make it
    run for very long.

    Args:
        name: what ``OctavConfig.weight_clip`` and ``activation_clip`` call it.
        check_options: called with the options when a config is made; raises ``ValueError`` for impossible ones. Without
            it the rule itself is called then, with a tensor of one element.
    """

    def register(rule: Rule) -> Rule:
        if name in CLIP_RULES:
            raise ValueError(f"a clipping rule named {name!r} is already registered; choose another name")
        CLIP_RULES[name] = rule
        if check_options is not None:
            OPTION_CHECKS[name] = check_options
        return rule

    return register
