"""Frozen clips of activations as configs of format version 1 hold them: module name -> operand -> sign and clips."""

import math
from typing import Any

import torch

from .._utils.escaping import shown
from .frozen_clips import FrozenClips
from .granularity import ACTIVATION_GRANULARITIES

ClipsOfVersion1 = dict[str, dict[str, dict[str, Any]]]

_FIELD = "activation_clips"
_EXAMPLE = "{'MODULE NAME': {'input': {'signed': True, 'clips': [2.5]}}}"


def validate_activation_clips(activation_clips: Any) -> None:
    """Raise ``ValueError`` unless the argument has the form of version 1 and valid values."""
    if not isinstance(activation_clips, dict):
        raise ValueError(f"{_FIELD} must be of the form {_EXAMPLE}, got {shown(activation_clips)}")
    for module_name, operands in activation_clips.items():
        if not isinstance(module_name, str) or not isinstance(operands, dict):
            raise ValueError(
                f"{_FIELD}[{shown(module_name)}]: {_FIELD} must be of the form {_EXAMPLE}, got {shown(operands)}"
            )
        for operand, frozen in operands.items():
            where = f"{_FIELD}[{shown(module_name)}][{shown(operand)}]"
            if operand not in ACTIVATION_GRANULARITIES:
                raise ValueError(f"{where}: unknown operand; choose from {', '.join(ACTIVATION_GRANULARITIES)}")
            if not isinstance(frozen, dict) or set(frozen) - {"offset"} != {"signed", "clips"}:
                raise ValueError(
                    f"{where} must be {{'signed': True or False, 'clips': [...]}}, and for an asymmetric grid "
                    f"'offset': NUMBER, got {shown(frozen)}"
                )
            _validate_frozen(where, operand, **frozen)


def _validate_frozen(where: str, operand: str, signed: Any, clips: Any, offset: Any = None) -> None:
    if not isinstance(signed, bool):
        raise ValueError(f"{where}: signed must be True or False, got {shown(signed)}")
    if operand != "input" and signed is (operand == "probabilities"):
        raise ValueError(
            f"{where}: signed is {signed}, but probabilities are always unsigned, and query, key and value signed"
        )
    if offset is not None and (operand != "input" or signed or not _is_clip(-offset if _is_number(offset) else offset)):
        raise ValueError(
            f"{where}: offset is the lowest value of the unsigned grid of a layer's input, a finite number below 0, "
            f"got {shown(offset)} for {shown(operand)} with signed {signed}"
        )
    if not isinstance(clips, list) or not clips or not all(map(_is_clip, clips)):
        raise ValueError(
            f"{where}: clips must be a list of finite numbers >= 0, got {shown(clips)}; a clip per head or channel is "
            "a list of numbers, or of lists of equal length"
        )
    if len(set(map(_shape, clips))) != 1:
        raise ValueError(f"{where}: clips of all calls must have one shape, got {sorted(set(map(_shape, clips)))}")
    if operand == "input" and (len(clips) != 1 or isinstance(clips[0], list)):
        got = f"{len(clips)}" if len(clips) != 1 else f"clips of shape {_shape(clips[0])}"
        raise ValueError(f"{where}: a layer's input has one clip, got {got}")


def _is_clip(clip: Any) -> bool:
    """Whether it is a finite number >= 0, or nested lists of them of one shape."""
    if isinstance(clip, list):
        return bool(clip) and all(map(_is_clip, clip)) and len(set(map(_shape, clip))) == 1
    return _is_number(clip) and math.isfinite(clip) and clip >= 0


def _shape(clip: Any) -> tuple[int, ...]:
    """Shape of nested lists; ``()`` for a number."""
    return (len(clip), *_shape(clip[0])) if isinstance(clip, list) else ()


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def as_frozen_clips(signed: bool, clips: list[Any], offset: float | None = None) -> FrozenClips:
    """The frozen clips of an operand in float64; the arguments must have been validated."""
    begin = None if offset is None else torch.tensor(offset, dtype=torch.float64, device="cpu")
    return FrozenClips(signed, torch.tensor(clips, dtype=torch.float64, device="cpu"), begin)
