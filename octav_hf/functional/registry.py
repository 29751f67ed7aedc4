"""Registry of the clipping rules."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from .._utils.torch_private import has_values
from .rows import Dim, Sign, not_finite_error, shape_of_clips, statistics_dtype

ClipRule = Callable[..., Tensor]
Rule = TypeVar("Rule", bound=ClipRule)

CLIP_RULES: dict[str, ClipRule] = {}
"""Name -> ``rule(x, num_bits, *, signed=True, dim=None, **options) -> clip``, see ``register_clip_rule``."""

OPTION_CHECKS: dict[str, Callable[..., None]] = {}
"""Name -> ``check(**options)``, which raises ``ValueError`` for invalid options."""

RULES_OF_TABLES: dict[str, ClipRule] = {}
"""Name -> ``rule(table, num_bits, signed, **options) -> clip`` for a magnitude table."""

RULES_OF_RANGES: set[str] = set()
"""Names of rules whose clip depends only on the lowest and the highest value."""

RULE_ARGUMENTS = ("x", "num_bits", "signed", "dim", "skip")
"""Arguments of rules that are no options."""

_TENSOR_SIGN: set[str] = set()  # rules that accept a tensor ``signed`` and ``skip``


def poolable_rules() -> list[str]:
    """Rules that can combine values from several ranks or batches."""
    return sorted(RULES_OF_TABLES.keys() | RULES_OF_RANGES)


def takes_skip(name: str) -> bool:
    """Whether the rule ``name`` accepts ``skip``."""
    return name in _TENSOR_SIGN


def register_clip_rule(
    name: str,
    *,
    check_options: Callable[..., None] | None = None,
    of_table: ClipRule | None = None,
    of_range: bool = False,
    tensor_sign: bool = False,
) -> Callable[[Rule], Rule]:
    """Decorator: register a clipping rule under ``name``, so that configs can use it.

    ``rule(x, num_bits, *, signed=True, dim=None, **options)`` returns the clips of ``x``, finite and not negative:
    ``[]`` for ``dim=None``, otherwise the shape of ``x`` with the dimension(s) ``dim`` of size 1. A quantizer raises
    ``ValueError`` for another shape, and in eager mode on the CPU for other values, which NaN in ``x`` may cause.

    Options may come from an untrusted checkpoint, so ``check_options`` must reject values that would make the rule run
    for very long.

    Args:
        name: the value of ``OctavConfig.weight_clip`` and ``activation_clip`` that selects the rule.
        check_options: called with the options when a config is made; raises ``ValueError`` for invalid options.
            Without it, the rule itself is called with a tensor of one element.
        of_table: the rule as a function of a magnitude table (``table.py``). A rule without ``of_table`` and
            ``of_range`` cannot combine values from several ranks or batches.
        of_range: whether the clip depends only on the lowest and the highest value.
        tensor_sign: whether the rule accepts a bool tensor ``[]`` as ``signed``, so that a sign computed from the data
            needs no synchronization, and ``skip``; and raises the errors of ``octav_clip`` for NaN and Inf itself. A
            rule without it is called for both signs, and must therefore accept negative values on the unsigned grid.

    Raises:
        ValueError: a rule of this name exists.
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
    """The clip of rule ``name``, whose ``signed`` may be a tensor; the result is unspecified if ``skip`` is true."""
    rule = CLIP_RULES[name]
    if name in _TENSOR_SIGN and (skip is not None or isinstance(signed, Tensor)):
        return rule(x, num_bits, signed=signed, dim=dim, skip=skip, **options)

    def of_sign(signed: bool) -> Tensor:
        clip = rule(x, num_bits, signed=signed, dim=dim, **options)
        return clip if name in _TENSOR_SIGN else _checked(name, clip, x, dim)

    return torch.where(signed, of_sign(True), of_sign(False)) if isinstance(signed, Tensor) else of_sign(signed)


def _checked(name: str, clip: Any, x: Tensor, dim: Dim) -> Tensor:
    """The result ``clip`` of a rule, without gradient and in the dtype of clips; ``ValueError`` if it is invalid."""
    returned, shape = f"the clip rule {name!r} returned", shape_of_clips(x, dim)
    if not isinstance(clip, Tensor) or tuple(clip.shape) != shape:
        got = f"a tensor of shape {tuple(clip.shape)}" if isinstance(clip, Tensor) else f"a {type(clip).__name__}"
        raise ValueError(
            f"{returned} {got} for x of shape {tuple(x.shape)} and dim={dim}; it must return a tensor of shape {shape} "
            "(reduce with keepdim=True if dim is not None)"
        )
    clip = clip.detach().to(statistics_dtype(x.dtype))
    if torch.compiler.is_compiling() or x.numel() == 0 or clip.device.type != "cpu" or not has_values(clip):
        return clip
    if not bool(((clip >= 0) & (clip < torch.inf)).all()):
        if not bool(x.isfinite().all()):
            raise not_finite_error(x, name)
        raise ValueError(
            f"{returned} NaN, Inf or a negative clip for x of shape {tuple(x.shape)}, which is finite; clips must be "
            "finite and not negative"
        )
    return clip
