"""Frozen clips in checkpoint files: prepare buffers for them before the weights are loaded."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from .._utils.transformers_compat import tied_to
from ..nn import FROZEN_TENSORS, HoldsFrozenClips
from .names import name_variants, names_in_model

_ENDS = tuple(f"_quantizer.{name}" for name in FROZEN_TENSORS)


def prepare_frozen(
    model: PreTrainedModel, checkpoint: Iterable[str] | Mapping[str, Tensor], *, frozen_weights: Collection[str]
) -> list[Any]:
    """Freeze the clips that a checkpoint contains for a converted model; their values are loaded with the weights.

    Args:
        model: the converted model.
        checkpoint: files, or a state dict.
        frozen_weights: the layers whose weight clips are frozen according to the config.

    Returns:
        The layers of ``frozen_weights`` whose weight is missing in the checkpoint or has another shape, such as a new
        head. Their clips can be frozen once the weight is initialized.

    Raises:
        ValueError: clips do not fit their module, or the clips of a weight are missing.
    """
    found = _clips_and_shapes(checkpoint)
    if not frozen_weights and not any(isinstance(entry, Tensor) for entry in found.values()):
        return []
    in_model, prefix = names_in_model(found, model), model.base_model_prefix

    def find(module: str, tensor: str) -> tuple[Any, bool]:
        """The entry of a module's tensor, ``None`` if missing; and whether it is loaded unmerged and unsplit."""
        names = (f"{variant}.{tensor}" for variant in name_variants(module, prefix))
        name, is_whole = next((in_model[name] for name in names if name in in_model), (None, True))
        return None if name is None else found[name], is_whole

    new = []
    for name, module in model.named_modules():
        for operand in module.freezable_quantizers if isinstance(module, HoldsFrozenClips) else ():
            clips = {buffer: find(name, f"{operand}_quantizer.{buffer}")[0] for buffer in FROZEN_TENSORS}
            clips = {buffer: tensor for buffer, tensor in clips.items() if tensor is not None}
            if operand == "weight" and not tied_to(model, f"{name}.weight"):
                shape, is_whole = find(name, "weight")
                if shape is None or (is_whole and shape != module.weight.shape):
                    new += [module] if name in frozen_weights else []
                    continue
                if name in frozen_weights and not clips:
                    raise ValueError(
                        f"{name}: this checkpoint has no clips for its weight of shape {tuple(module.weight.shape)}, "
                        "which should be frozen. Load it with the model class that it was saved with (architectures in "
                        "config.json), and call uncalibrate_octav before changing its head"
                    )
            problem = module.freeze_from(operand, clips) if clips else ""
            if problem:
                raise ValueError(f"{name}.{operand}_quantizer: the frozen clips in this checkpoint {problem}")
    return new


def _clips_and_shapes(checkpoint: Iterable[str] | Mapping[str, Tensor]) -> dict[str, Tensor | torch.Size]:
    """Name in the checkpoint -> the tensor, if it belongs to frozen clips, otherwise its shape."""
    if isinstance(checkpoint, Mapping):
        return {name: _entry(name, tensor) for name, tensor in checkpoint.items()}
    return {name: entry for file in checkpoint for name, entry in _of_file(str(file))}


def _of_file(file: str) -> Iterator[tuple[str, Tensor | torch.Size]]:
    if not file.endswith(".safetensors"):
        for name, tensor in torch.load(file, map_location="cpu", mmap=True, weights_only=True).items():
            yield name, _entry(name, tensor)
        return
    with safe_open(file, framework="pt") as opened:
        for name in opened.keys():  # noqa: SIM118  # not a dictionary
            is_clips = name.endswith(_ENDS)
            yield name, opened.get_tensor(name) if is_clips else torch.Size(opened.get_slice(name).get_shape())


def _entry(name: str, tensor: Tensor) -> Tensor | torch.Size:
    return tensor if name.endswith(_ENDS) else tensor.shape
