"""Freeze a model at the activation clips in a config of format version 1."""

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
    """Match clips with the modules of ``model``, with or without the base model's prefix; skip those of other modules.

    Raises:
        ValueError: the module exists, but the clips do not fit its operand.
    """
    modules, matched = dict(model.named_modules()), []
    for name, operands in clips.items():
        variants = name_variants(name, model.base_model_prefix)
        module = next((modules[variant] for variant in variants if variant in modules), None)
        for operand, entry in operands.items() if module is not None else ():
            where = f"activation_clips[{name!r}][{operand!r}]"
            if not isinstance(module, HoldsFrozenClips) or operand not in module.freezable_quantizers:
                raise ValueError(
                    f"{where} is not a quantized activation of {type(model).__name__}; the clips belong to another "
                    "model or config: remove them from config.json and call calibrate_octav on this model"
                )
            frozen = as_frozen_clips(**entry)
            problem = module.problem_with(operand, frozen)
            if problem:
                raise ValueError(f"{where} {problem}; remove these clips from config.json and call calibrate_octav")
            matched.append(OperandClips(module, operand, frozen))
    return tuple(matched)


def freeze_version_1(clips: Iterable[OperandClips]) -> None:
    """Freeze the clips that ``match_version_1`` found. Called after the weights are loaded, to use their dtype."""
    for module, operand, frozen in clips:
        place = next(module.parameters(), frozen.clips)
        dtype = statistics_dtype(place.dtype)
        device = "cpu" if place.is_meta else place.device  # where weights are offloaded
        begin = None if frozen.offset is None else frozen.offset.to(device, dtype)
        module.freezable_quantizers[operand].freeze(FrozenClips(frozen.signed, frozen.clips.to(device, dtype), begin))
