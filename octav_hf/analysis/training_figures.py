"""Statistics of one step as figures for a log."""

import math
from collections.abc import Mapping, Sequence

from .operand_statistics import OperandStatistics

_PREFIX = "octav"
_EXTREMES = {"sqnr_db": (min,), "clipped_share": (max,), "clip_ratio": (min, max), "changed_codes": (min,)}


def summary(
    statistics: Sequence[OperandStatistics],
    changed_codes: Mapping[str, float],
    first_clips: Mapping[tuple[str, str], float],
) -> tuple[dict[str, float], dict[str, str]]:
    """Means and extremes over weights and over activations.

    Args:
        statistics: of all operands.
        changed_codes: layer -> share of its weights whose code changed.
        first_clips: module and operand -> clip to compare with.

    Returns:
        The figures, named as in ``OctavCallback``, and for each minimum and maximum the operand that has it.
    """
    found: dict[tuple[str, str], dict[str, float]] = {}
    for operand in statistics:
        kind, name = "weight" if operand.operand == "weight" else "activation", (operand.module, operand.operand)
        figures = _figures(operand)
        if operand.clip is not None and name in first_clips:
            figures["clip_ratio"] = operand.clip / first_clips[name]
        for figure, value in figures.items():
            found.setdefault((kind, figure), {})[" ".join(name)] = value
    for module, share in changed_codes.items():
        found.setdefault(("weight", "changed_codes"), {})[f"{module} weight"] = share
    values: dict[str, float] = {}
    operands: dict[str, str] = {}
    for (kind, figure), by_name in found.items():
        if figure not in _EXTREMES:
            continue
        key = f"{_PREFIX}/{kind}_{figure}"
        values[f"{key}_mean"] = math.fsum(by_name.values()) / len(by_name)
        for extreme in _EXTREMES[figure]:
            name_of_extreme = extreme(by_name, key=by_name.__getitem__)
            values[f"{key}_{extreme.__name__}"] = by_name[name_of_extreme]
            operands[f"{key}_{extreme.__name__}_operand"] = name_of_extreme
    return values, operands


def per_layer(statistics: Sequence[OperandStatistics], changed_codes: Mapping[str, float]) -> dict[str, float]:
    """``octav/<module>/<operand>/<figure>`` -> value, for every operand."""
    values = {
        f"{_PREFIX}/{operand.module}/{operand.operand}/{figure}": value
        for operand in statistics
        for figure, value in _figures(operand).items()
    }
    return values | {f"{_PREFIX}/{name}/weight/changed_codes": share for name, share in changed_codes.items()}


def _figures(operand: OperandStatistics) -> dict[str, float]:
    """The figures that are finite numbers; an operand without error has no SQNR, one that was not reached has none."""
    figures = {"sqnr_db": operand.sqnr_db, "clip": operand.clip, "clipped_share": operand.clipped_share}
    return {name: value for name, value in figures.items() if value is not None and math.isfinite(value)}
