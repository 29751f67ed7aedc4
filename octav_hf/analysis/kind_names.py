"""Names of kinds of operand, for people."""

from collections import Counter
from collections.abc import Mapping, Sequence

from .operand_kinds import pattern_of
from .sensitivity import KindSensitivity

_PLURALS = {"query": "queries", "probabilities": "probabilities"}


def kind_names(kinds: Sequence[KindSensitivity], functions: Mapping[str, str]) -> list[str]:
    """A plural noun for each kind, such as ``"outputs of GELU (inputs of output.dense)"``.

    Modules are named by the part after the last ``*``, or in full where two kinds would have the same name.

    Args:
        functions: as from ``activation_functions``.
    """
    of_pattern = {pattern_of(module): function for module, function in functions.items()}
    short = [_name(kind, [module.rpartition("*.")[2] for module in kind.modules]) for kind in kinds]
    counts = Counter(short)
    names = [name if counts[name] == 1 else _name(kind, kind.modules) for kind, name in zip(kinds, short, strict=True)]
    after = [of_pattern.get(kind.modules[0]) if kind.operand == "input" else None for kind in kinds]
    return [
        name if function is None else f"outputs of {function} ({name})"
        for name, function in zip(names, after, strict=True)
    ]


def listed(parts: Sequence[str]) -> str:
    """``a, b and c``."""
    return " and ".join(filter(None, [", ".join(parts[:-1]), parts[-1]]))


def _name(kind: KindSensitivity, modules: Sequence[str]) -> str:
    parent = modules[0].rpartition(".")[0]
    others = [module.removeprefix(f"{parent}.") for module in modules[1:]]
    return f"{_PLURALS.get(kind.operand, f'{kind.operand}s')} of {listed([modules[0], *others])}"
