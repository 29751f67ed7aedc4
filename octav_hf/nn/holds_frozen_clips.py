"""Frozen clips in state dicts: loading one freezes or unfreezes a module's quantizers."""

from collections.abc import Mapping
from itertools import chain
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .._utils.sharded_weights import sharded_shape
from .._utils.torch_private import has_values, own_parameters
from ..functional.rows import statistics_dtype
from .fake_quantize import FROZEN_TENSORS, FakeQuantize
from .frozen_clips import FrozenClips
from .weight_fake_quantize import WeightFakeQuantize


class HoldsFrozenClips(nn.Module):
    """Mixin of modules with quantizers ``<operand>_quantizer``, whose frozen clips may be in a state dict.

    ``load_state_dict`` freezes clips that the state dict contains, whatever their shape. If it covers the module but
    contains no clips, clips become dynamic. A state dict of other modules, such as an adapter's, changes nothing.
    """

    max_calls: ClassVar[int | None] = None  # maximum number of matmuls of an operand per forward pass, if known

    @property
    def operand_quantizers(self) -> dict[str, nn.Module]:
        """The quantizers by operand; ``nn.Identity`` for an operand in float."""
        raise NotImplementedError

    def is_covered(self, state_dict: Mapping[str, Any], prefix: str) -> bool:
        """Whether a state dict, with names of this module below ``prefix``, contains this module."""
        raise NotImplementedError

    @property
    def freezable_quantizers(self) -> dict[str, FakeQuantize]:
        """Operand -> quantizer, for quantizers whose clips can be frozen: all but packed weights and embeddings."""
        return {
            operand: quantizer
            for operand, quantizer in self.operand_quantizers.items()
            if isinstance(quantizer, FakeQuantize)
            and (operand != "weight" or isinstance(quantizer, WeightFakeQuantize))
        }

    def problem_with(self, operand: str, frozen: FrozenClips) -> str:
        """Why these clips of ``operand`` cannot be frozen, for an error message; empty if they can."""
        quantizer = self.freezable_quantizers[operand]
        tensors = [frozen.clips] if frozen.offset is None else [frozen.clips, -frozen.offset]
        if not all(tensor.is_floating_point() for tensor in tensors):
            return f"have the dtype {frozen.clips.dtype}, which must be floating point"
        problem = quantizer.frozen_problem(frozen, self._weight_shape(), self.max_calls)
        if problem or not all(map(has_values, tensors)):
            return problem
        if all(bool(((tensor >= 0) & tensor.isfinite()).all()) for tensor in tensors):
            return ""
        return "contain a negative value, NaN or Inf, or their offset is NaN, Inf or positive"

    def _weight_shape(self) -> tuple[int, ...]:
        weight = own_parameters(self).get("weight")
        return () if weight is None else sharded_shape(weight) or tuple(weight.shape)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        if self.is_covered(state_dict, prefix):
            self.unfreeze_missing(state_dict, prefix)
        for operand, quantizer in self.freezable_quantizers.items():
            names = _names(operand, prefix)
            found = {name: state_dict[key] for name, key in names.items() if key in state_dict}
            problem = self.freeze_from(operand, found) if found else ""
            if problem:
                error_msgs.append(f"{prefix}{operand}_quantizer: the frozen clips in the state dict {problem}")
                for name, key in names.items():  # keep the quantizer as it is
                    state_dict.pop(key, None)
                    if getattr(quantizer, name) is not None:
                        state_dict[key] = getattr(quantizer, name)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def unfreeze_missing(self, state_dict: Mapping[str, Any], prefix: str) -> None:
        """Make clips dynamic that are not in a state dict, with names of this module below ``prefix``."""
        for operand, quantizer in self.freezable_quantizers.items():
            if not any(name in state_dict for name in _names(operand, prefix).values()):
                quantizer.unfreeze()

    @torch.inference_mode(False)
    def freeze_from(self, operand: str, found: Mapping[str, Any]) -> str:
        """Freeze the clips of ``operand`` at tensors of a checkpoint.

        Buffers that already have the right form keep their values; the checkpoint is then loaded into them.

        Args:
            operand: one of ``freezable_quantizers``.
            found: name of a buffer or parameter -> tensor.

        Returns:
            Why the tensors are invalid, in which case the quantizer is unchanged; empty if they are valid.
        """
        quantizer = self.freezable_quantizers[operand]
        clips = [found[name] for name in ("clips", "unsigned_clips") if name in found]
        correction = found.get("clip_correction")
        if len(clips) != 1 or not all(isinstance(tensor, Tensor) for tensor in found.values()):
            return f"are {sorted(found)}; there must be one tensor clips or unsigned_clips, and an offset is optional"
        if correction is not None and (operand == "weight" or correction.shape != clips[0].shape):
            return (
                f"have the shape {tuple(clips[0].shape)}, and their clip_correction {tuple(correction.shape)}; only "
                "clips of activations can have one, and it must have their shape"
            )
        frozen = FrozenClips("clips" in found, clips[0], found.get("offset"), correction)
        problem = self.problem_with(operand, frozen.corrected)
        forms = {name: (tensor.shape, statistics_dtype(tensor.dtype)) for name, tensor in found.items()}
        known = {name: getattr(quantizer, name) for name in FROZEN_TENSORS}
        if problem or forms == {name: (x.shape, x.dtype) for name, x in known.items() if x is not None}:
            return problem
        device = next((tensor.device for tensor in chain(self.parameters(), self.buffers())), clips[0].device)
        own = {name: tensor.detach().to(device, forms[name][1], copy=True) for name, tensor in found.items()}
        clips_name = "clips" if frozen.signed else "unsigned_clips"
        learned = known["clip_correction"]
        if learned is not None and forms.get("clip_correction") == (learned.shape, learned.dtype):
            own["clip_correction"] = learned  # an optimizer may have it; the values of the checkpoint are loaded next
        quantizer.freeze(FrozenClips(frozen.signed, own[clips_name], own.get("offset"), own.get("clip_correction")))
        return ""


def _names(operand: str, prefix: str) -> dict[str, str]:
    """Name of a tensor of frozen clips -> its key in a state dict."""
    return {name: f"{prefix}{operand}_quantizer.{name}" for name in FROZEN_TENSORS}
