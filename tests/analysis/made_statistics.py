"""Statistics of operands with chosen values."""

from __future__ import annotations

from typing import Any

from octav_hf.analysis.operand_statistics import OperandStatistics


def statistics(module: str, operand: str, **values: Any) -> OperandStatistics:
    """Those of an operand in order; keyword arguments change them."""
    ordinary = {
        "bits": 4,
        "signed": True,
        "asymmetric": False,
        "elements": 1000,
        "sqnr_db": 20.0,
        "clipped_share": 0.01,
        "zero_share": 0.1,
        "clip": 1.0,
        "lowest_clip": 1.0,
        "highest_clip": 1.0,
        "lowest": -2.0,
        "highest": 2.0,
    }
    return OperandStatistics(module, operand, **(ordinary | values))


def unreached(module: str, operand: str) -> OperandStatistics:
    """Those of an operand that no batch reached."""
    nothing = dict.fromkeys(("sqnr_db", "clipped_share", "zero_share", "clip", "lowest_clip", "highest_clip"))
    return statistics(module, operand, elements=0, signed=None, asymmetric=None, lowest=None, highest=None, **nothing)
