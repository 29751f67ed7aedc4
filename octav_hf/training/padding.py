"""Padding masks, and the inputs of a batch by name."""

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from .._utils.forward_pass import Batch

IGNORED = -100  # label that losses ignore


def inputs_by_name(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call of ``model`` by name; ``TypeError`` if its forward has no names for them."""
    if not args:
        return kwargs
    parameters = inspect.signature(model.forward).parameters.values()
    names = [parameter.name for parameter in parameters if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
    if len(args) > len(names):
        raise TypeError(f"{type(model).__name__}.forward names no such inputs: pass them by keyword: input_ids=ids")
    return dict(zip(names, args, strict=False)) | kwargs


def inputs_of(model: nn.Module, batch: Batch) -> dict[str, Any]:
    """The inputs of a batch by name; errors as for ``inputs_by_name``."""
    if isinstance(batch, Mapping):
        return dict(batch)
    return inputs_by_name(model, (batch,) if isinstance(batch, Tensor) else tuple(batch), {})


def has_decoder(model: nn.Module) -> bool:
    """Whether this is an encoder-decoder model."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def attention_mask(inputs: dict[str, Any]) -> Any:
    """The attention mask, ``[batch, tokens]`` also for multiple choice, where each choice is one of the batch."""
    mask = inputs.get("attention_mask")
    return mask.flatten(0, -2) if isinstance(mask, Tensor) and mask.dim() == 3 else mask


def decoder_mask(inputs: dict[str, Any]) -> Any:
    """The mask of the decoder's tokens, computed from the labels if it is not given; ``None`` if unknown."""
    mask, labels = inputs.get("decoder_attention_mask"), inputs.get("labels")
    return labels != IGNORED if mask is None and isinstance(labels, Tensor) else mask


def mask_of(mask: Any, shape: tuple[int, ...], like: Tensor) -> Tensor | None:
    """``mask`` as a bool tensor on the device of ``like``; ``None`` unless it is a tensor of this shape."""
    return mask.to(like.device).bool() if isinstance(mask, Tensor) and tuple(mask.shape) == shape else None
