"""``OctavConfig.activation_clips``: frozen clips as a config holds them, module name -> operand -> sign and clips."""

import math
from collections.abc import Mapping
from typing import Any

from . import FrozenClips
from .frozen_clips import Clip, as_clip, clip_shape
from .granularity import ACTIVATION_GRANULARITIES

ActivationClips = dict[str, dict[str, dict[str, Any]]]

_FIELD = "activation_clips"
_EXAMPLE = "{'MODULE NAME': {'input': {'signed': True, 'clips': [2.5]}}}"


def validate_activation_clips(activation_clips: Any) -> None:
    """Raise ``ValueError`` unless it has the form that ``calibrate_octav`` writes, and possible values."""
    if not isinstance(activation_clips, dict):
        raise ValueError(f"{_FIELD} must be of the form {_EXAMPLE}, got {activation_clips!r}")
    for module_name, operands in activation_clips.items():
        if not isinstance(module_name, str) or not isinstance(operands, dict):
            raise ValueError(f"{_FIELD}[{module_name!r}]: the form is {_EXAMPLE}, got {operands!r}")
        for operand, frozen in operands.items():
            where = f"{_FIELD}[{module_name!r}][{operand!r}]"
            if operand not in ACTIVATION_GRANULARITIES:
                raise ValueError(
                    f"{where}: no activation has that name; choose from {', '.join(ACTIVATION_GRANULARITIES)}"
                )
            if not isinstance(frozen, dict) or set(frozen) - {"offset"} != {"signed", "clips"}:
                raise ValueError(
                    f"{where} must be {{'signed': True or False, 'clips': [...]}}, and for an asymmetric grid "
                    f"'offset': NUMBER, got {frozen!r}"
                )
            _validate_frozen(where, operand, **frozen)


def _validate_frozen(where: str, operand: str, signed: Any, clips: Any, offset: Any = None) -> None:
    if not isinstance(signed, bool):
        raise ValueError(f"{where}: signed must be True or False, got {signed!r}")
    if operand != "input" and signed is (operand == "probabilities"):
        raise ValueError(
            f"{where}: signed is {signed}, but probabilities are never negative and query, key and value have two signs"
        )
    if offset is not None and (operand != "input" or signed or not _is_clip(-offset if _is_number(offset) else offset)):
        raise ValueError(
            f"{where}: offset is where the unsigned grid of a layer's input begins, a finite number below 0, got "
            f"{offset!r} for {operand!r} with signed {signed}"
        )
    if not isinstance(clips, list) or not clips or not all(map(_is_clip, clips)):
        raise ValueError(
            f"{where}: clips must be a list of finite numbers >= 0, got {clips!r}; one that differs among heads or "
            "channels is a list of numbers, or of lists of them that are all as long as each other"
        )
    if operand == "input" and (len(clips) != 1 or isinstance(clips[0], list)):
        got = f"{len(clips)}" if len(clips) != 1 else f"those of shape {clip_shape(as_clip(clips[0]))}"
        raise ValueError(f"{where}: a layer's input has one clip, got {got}")


def _is_clip(clip: Any) -> bool:
    """Whether it is a possible number, or nested lists of them that are all of one shape."""
    if isinstance(clip, list):
        return bool(clip) and all(map(_is_clip, clip)) and len({clip_shape(as_clip(part)) for part in clip}) == 1
    return _is_number(clip) and math.isfinite(clip) and clip >= 0


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def frozen_clips(activation_clips: Mapping[str, Any], module_name: str, operand: str) -> FrozenClips | None:
    """The frozen clips of one operand; ``None`` if it has none, so that its clips are dynamic."""
    frozen = activation_clips.get(module_name, {}).get(operand)
    return None if frozen is None else FrozenClips(**_values(**frozen))


def frozen_fields(frozen: FrozenClips) -> dict[str, Any]:
    """Frozen clips as the config holds them."""
    offset = {"offset": frozen.offset} if frozen.offset else {}
    return {"signed": frozen.signed, "clips": [_as_lists(clip) for clip in frozen.clips], **offset}


def _values(clips: list[Any], **others: Any) -> dict[str, Any]:
    return {"clips": tuple(map(as_clip, clips)), **others}


def _as_lists(clip: Clip) -> Any:
    return [_as_lists(part) for part in clip] if isinstance(clip, tuple) else clip
