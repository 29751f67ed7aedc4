"""Clipping rules by name."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from .rows import Dim, Sign

ClipRule = Callable[..., Tensor]
Rule = TypeVar("Rule", bound=ClipRule)

CLIP_RULES: dict[str, ClipRule] = {}
"""Name -> ``rule(x, num_bits, *, signed=True, dim=None, **options) -> clip``."""

OPTION_CHECKS: dict[str, Callable[..., None]] = {}
"""Name -> ``check(**options)``, which raises ``ValueError`` for options that the rule refuses; needs no tensor."""

RULES_OF_TABLES: dict[str, ClipRule] = {}
"""Name -> ``rule(table, num_bits, signed, **options) -> clip`` of a tensor with this magnitude table."""

RULES_OF_RANGES: set[str] = set()
"""Names of rules whose clip is that of the lowest and the highest value alone."""

RULE_ARGUMENTS = ("x", "num_bits", "signed", "dim", "skip")
"""Arguments of rules that are not options."""

_TENSOR_SIGN: set[str] = set()  # rules whose ``signed`` may be a tensor, and which take ``skip``


def poolable_rules() -> list[str]:
    """Rules for values that are on several ranks, or in several batches."""
    return sorted(RULES_OF_TABLES.keys() | RULES_OF_RANGES)


def takes_skip(name: str) -> bool:
    """Whether the rule ``name`` leaves a tensor unread where ``skip`` is true; others read it whatever it holds."""
    return name in _TENSOR_SIGN


def register_clip_rule(
    name: str,
    *,
    check_options: Callable[..., None] | None = None,
    of_table: ClipRule | None = None,
    of_range: bool = False,
    tensor_sign: bool = False,
) -> Callable[[Rule], Rule]:
    """Decorator: register a clipping rule under ``name``, for the config too; ``ValueError`` if it is taken.

    Options come from checkpoints too, which anybody may have written, so a rule has to refuse those that would make it
    run for very long.

    Args:
        name: what ``OctavConfig.weight_clip`` and ``activation_clip`` call it.
        check_options: called with the options when a config is made; raises ``ValueError`` for impossible ones. Without
            it the rule itself is called then, with a tensor of one element.
        of_table: the rule as a function of a magnitude table (``table.py``). Without it, and without
            ``of_range``, there is no clip of values that are on several ranks or in several batches.
        of_range: whether the clip is that of the lowest and the highest value alone.
        tensor_sign: whether ``signed`` may also be a bool tensor ``[]``, for a sign that the data decide without a
            read on the host, and whether the rule takes ``skip``. A rule that does not is called for both signs then,
            so that it has to accept negative values on the unsigned grid.
    """

    def register(rule: Rule) -> Rule:
        if name in CLIP_RULES:
            raise ValueError(f"a clipping rule named {name!r} is already registered; choose another name")
        CLIP_RULES[name] = rule
        if check_options is not None:
            OPTION_CHECKS[name] = check_options
        if of_table is not None:
            RULES_OF_TABLES[name] = of_table
        if of_range:
            RULES_OF_RANGES.add(name)
        if tensor_sign:
            _TENSOR_SIGN.add(name)
        return rule

    return register


def clip_for_sign(
    name: str, x: Tensor, num_bits: int, *, signed: Sign, dim: Dim, skip: Tensor | None = None, **options: Any
) -> Tensor:
    """The clip by the rule ``name`` on the grid that ``signed`` says; anything where ``skip``, bool ``[]``, is true."""
    rule = CLIP_RULES[name]
    if name in _TENSOR_SIGN and (skip is not None or isinstance(signed, Tensor)):
        return rule(x, num_bits, signed=signed, dim=dim, skip=skip, **options)
    if not isinstance(signed, Tensor):
        return rule(x, num_bits, signed=signed, dim=dim, **options)
    of_signed, of_unsigned = (rule(x, num_bits, signed=sign, dim=dim, **options) for sign in (True, False))
    return torch.where(signed, of_signed, of_unsigned)
