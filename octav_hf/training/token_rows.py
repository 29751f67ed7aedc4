"""Which rows of the layers' inputs are tokens, and which are padding."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .._utils.forward_pass import Batch
from .padding import attention_mask, decoder_mask, has_decoder, inputs_of


class TokenRows:
    """The rows of layers' inputs that attention masks do not exclude.

    In an encoder-decoder model, a layer sees the encoder's tokens if it is inside the encoder, or if its input is the
    encoder's output, as for keys and values of cross-attention.
    """

    def __init__(self, model: nn.Module):
        self._model = model
        self._encoder = _encoder(model)
        self._outputs: list[Any] = []
        self._of_encoder: set[str] = set()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Context of a forward pass whose calls ``note`` gets."""
        if self._encoder is None:
            yield
            return
        handle = self._encoder.register_forward_hook(lambda module, args, output: self._outputs.append(output))
        try:
            yield
        finally:
            handle.remove()

    def note(self, calls: Sequence[tuple[str, Tensor]]) -> None:
        """Find the layers that see the encoder's tokens, from ``(name, input)`` of each call."""
        if self._encoder is not None:
            inside = set(self._encoder.modules())
            within = {name for name, module in self._model.named_modules() if module in inside}
            hidden = [output if isinstance(output, Tensor) else output[0] for output in self._outputs]
            self._of_encoder = {name for name, x in calls if name in within or any(x is each for each in hidden)}
        self._outputs.clear()

    def kept(self, name: str, batch: Batch, shape: Sequence[int]) -> Tensor | None:
        """The rows of a layer's input ``[*shape, features]`` that are tokens, bool and flat; ``None``: unknown."""
        inputs = inputs_of(self._model, batch)
        if not has_decoder(self._model) or name in self._of_encoder:
            return _in_order(attention_mask(inputs), shape)
        mask = decoder_mask(inputs)
        rows = _in_order(mask, shape)
        # A projection of the encoder's output, if the decoder has another width, has as many tokens as the encoder.
        return _in_order(attention_mask(inputs), shape) if rows is None and mask is not None else rows


def _in_order(mask: Any, shape: Sequence[int]) -> Tensor | None:
    """A mask flattened in the order of an input ``[*shape, features]``; ``None`` if it is none of that size."""
    if not isinstance(mask, Tensor) or mask.dim() != 2 or torch.Size(shape).numel() != mask.numel():
        return None
    # Longformer and XLNet compute layers on [tokens, batch].
    is_transposed = tuple(shape) == tuple(mask.shape[::-1]) != tuple(mask.shape)
    return (mask.t() if is_transposed else mask).bool().flatten()


def _encoder(model: nn.Module) -> nn.Module | None:
    get_encoder: Any = getattr(model, "get_encoder", None)
    return get_encoder() if has_decoder(model) and get_encoder is not None else None
