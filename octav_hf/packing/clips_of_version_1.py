"""Freezing a model at the clips of activations that a config of format version 1 has."""

from collections.abc import Iterable
from typing import NamedTuple

from transformers import PreTrainedModel

from ..functional.rows import statistics_dtype
from ..nn import FrozenClips, HoldsFrozenClips
from ..nn.clips_of_version_1 import ClipsOfVersion1, as_frozen_clips
from .names import name_variants


class OperandClips(NamedTuple):
    """An operand of a module, and its clips in float64."""

    module: HoldsFrozenClips
    operand: str
    frozen: FrozenClips


def match_version_1(model: PreTrainedModel, clips: ClipsOfVersion1) -> tuple[OperandClips, ...]:
    """The modules of ``model`` that the clips are for, with and without the base model's prefix; others are left out.

    Raises:
        ValueError: clips do not fit the operand of a module that is there.
    """
    modules, matched = dict(model.named_modules()), []
    for name, operands in clips.items():
        variants = name_variants(name, model.base_model_prefix)
        module = next((modules[variant] for variant in variants if variant in modules), None)
        for operand, entry in operands.items() if module is not None else ():
            where = f"activation_clips[{name!r}][{operand!r}]"
            if not isinstance(module, HoldsFrozenClips) or operand not in module.freezable_quantizers:
                raise ValueError(
                    f"{where} is no quantized activation of {type(model).__name__}; the clips are of another model or "
                    "config: remove them from config.json and call calibrate_octav on this one"
                )
            frozen = as_frozen_clips(**entry)
            problem = module.problem_with(operand, frozen)
            if problem:
                raise ValueError(f"{where} {problem}; remove these clips from config.json and call calibrate_octav")
            matched.append(OperandClips(module, operand, frozen))
    return tuple(matched)


def freeze_version_1(clips: Iterable[OperandClips]) -> None:
    """Freeze what ``match_version_1`` found, after the weights are loaded, in the dtype that the model now has."""
    for module, operand, frozen in clips:
        place = next(module.parameters(), frozen.clips)
        dtype = statistics_dtype(place.dtype)
        device = "cpu" if place.is_meta else place.device  # where weights are offloaded
        begin = None if frozen.offset is None else frozen.offset.to(device, dtype)
        module.freezable_quantizers[operand].freeze(FrozenClips(frozen.signed, frozen.clips.to(device, dtype), begin))
