"""The verdict of a report in a sentence: which operands are worst, and what to change first."""

import math
import re
from collections.abc import Iterable, Mapping
from statistics import fmean

from .operand_statistics import OperandStatistics
from .suggestions import Suggestion

_PLURAL = {"input": "inputs", "weight": "weights", "query": "queries", "key": "keys", "value": "values"}
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


def worst_groups(statistics: Iterable[OperandStatistics]) -> list[tuple[str, str, float]]:
    """Pattern of names, operand and mean SQNR in dB of the operands that differ only in a layer's number, worst first.

    Operands without error or without signal are left out.
    """
    groups: dict[tuple[str, str], list[float]] = {}
    for row in statistics:
        if row.sqnr_db is not None and math.isfinite(row.sqnr_db):
            groups.setdefault((_pattern(row.module), row.operand), []).append(row.sqnr_db)
    means = [(pattern, operand, fmean(values)) for (pattern, operand), values in groups.items()]
    return sorted(means, key=lambda group: group[2])


def verdict(
    statistics: Iterable[OperandStatistics], functions: Mapping[str, str], suggestions: list[Suggestion]
) -> str:
    """Two sentences.

    Args:
        functions: as from ``activation_functions``.
        suggestions: best first.
    """
    after = {(_pattern(module), "input"): f", after {function}" for module, function in functions.items()}
    named = [
        f"the {_PLURAL.get(operand, operand)} of {pattern}{after.get((pattern, operand), '')} ({sqnr:.1f} dB)"
        for pattern, operand, sqnr in worst_groups(statistics)[:2]
    ]
    worst = f"Quantization loses most in {' and '.join(named)}." if named else "No operand could be measured."
    if not suggestions:
        return worst
    first = suggestions[0]
    return f"{worst} Change first: {first.title}, which removes {100 * first.gain:.0f} % of the change of the logits."


def _pattern(module: str) -> str:
    """A module's name with ``*`` in place of the numbers of layers."""
    return _NUMBER.sub("*", module)
