"""The verdict of a report: which operands change the outputs most, and what to change first."""

from collections.abc import Mapping, Sequence

from .kind_names import kind_names, listed
from .operand_statistics import OperandStatistics
from .sensitivity import KindSensitivity
from .suggestions import Suggestion

_NAMED = 3  # kinds of operand


def verdict(
    kinds: Sequence[KindSensitivity],
    functions: Mapping[str, str],
    divergence: float | None,
    statistics: Sequence[OperandStatistics],
    suggestions: Sequence[Suggestion],
) -> str:
    """Two sentences.

    Args:
        kinds: the largest ``alone`` first. If they could not be measured, the operand with the lowest SQNR is named.
        functions: as from ``activation_functions``.
        divergence: of the model as it is.
        suggestions: the best first.
    """
    found = _worst_operand(statistics) if divergence is None else _worst_kinds(kinds, functions, divergence)
    if not suggestions:
        return found
    first = suggestions[0]
    return f"{found} Change first: {first.title}, which removes {100 * first.gain:.0f} % of the change of the outputs."


def _worst_kinds(kinds: Sequence[KindSensitivity], functions: Mapping[str, str], divergence: float) -> str:
    named = zip(kind_names(kinds, functions), kinds, strict=True)
    worst = [(f"the {name}", f"{kind.alone:.2g}") for name, kind in named if kind.alone > 0][:_NAMED]
    if not worst:
        return "No kind of operand changes the outputs when it is quantized alone."
    names, changes = (listed(parts) for parts in zip(*worst, strict=True))
    return (
        f"Quantization changes the outputs most in {names}: by {changes} when quantized alone, and by {divergence:.2g} "
        "when all operands are quantized."
    )


def _worst_operand(statistics: Sequence[OperandStatistics]) -> str:
    found = [(row.sqnr_db, f"{row.module} {row.operand}") for row in statistics if row.sqnr_db is not None]
    if not found:
        return "No operand could be measured."
    sqnr, name = min(found)
    return f"The operand with the lowest signal-to-noise ratio is {name} ({sqnr:.1f} dB)."
