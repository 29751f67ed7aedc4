"""The quantizer module: a grid, a clipping rule and a gradient estimator."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..functional import CLIP_RULES, fake_quantize, integer_range
from ..functional.rows import Dim
from .function_modes import outside_function_modes


class FakeQuantize(nn.Module):
    """Quantizes one operand: computes its clip from the data at every call, then rounds to the grid.

    Has no parameters and no buffers: a dynamic clip is recomputed, never stored.

    Args:
        num_bits: 2 to 8.
        clip: name of a clipping rule in ``functional.CLIP_RULES``.
        clip_options: further keyword arguments of that rule.
        gradient: ``"ste"``, ``"pwl"`` or ``"mad"``; see ``functional.fake_quantize``.
        signed: the two's-complement grid, or the unsigned one; ``None``: the unsigned one for a tensor that holds no
            negative value, found out from the tensor at every call.
        dim: the dimension(s) that share one clip; ``None`` for one clip for the whole tensor.
        name: where in the model this quantizer stands, for error messages.
    """

    def __init__(
        self,
        num_bits: int,
        *,
        clip: str = "octav",
        clip_options: Mapping[str, Any] | None = None,
        gradient: str = "mad",
        signed: bool | None = True,
        dim: Dim = None,
        name: str = "",
    ):
        super().__init__()
        self.num_bits = num_bits
        self.clip = clip
        self.clip_options = dict(clip_options or {})
        self.gradient = gradient
        self.signed = signed
        self.dim = dim
        self.name = name

    @property
    def settings(self) -> tuple[Any, ...]:
        """What the result depends on besides the input; equal for quantizers that do the same."""
        return self.num_bits, self.clip, self.clip_options, self.gradient, self.signed, self.dim

    @torch.compiler.disable
    @torch.no_grad()
    def is_signed(self, x: Tensor) -> bool:
        """Whether ``x`` is quantized on the signed grid."""
        if self.signed is not None:
            return self.signed
        # Most tensors with negative values have one in their first sample, which saves reading the rest. NaN is not
        # >= 0, and the clipping rule refuses it.
        first = x[:1] if x.dim() else x
        return x.numel() > 0 and not (bool(first.min() >= 0) and bool(x.min() >= 0))

    @torch.compiler.disable
    @outside_function_modes
    def compute_clip(self, x: Tensor, signed: bool | None = None) -> Tensor:
        """Clipping scalar(s) of ``x``, broadcastable against it. An error of the rule is raised with ``name`` added.

        Args:
            x: floating point, any shape.
            signed: what ``is_signed`` says of ``x``, where that is known already.
        """
        signed = self.is_signed(x) if signed is None else signed
        try:
            return CLIP_RULES[self.clip](x, self.num_bits, signed=signed, dim=self.dim, **self.clip_options)
        except (ValueError, TypeError) as error:
            raise type(error)(f"{self.name or 'FakeQuantize'}: {error}") from error

    def forward(self, x: Tensor) -> Tensor:
        """``x`` (float, any shape) on the grid; same shape and dtype."""
        signed = self.is_signed(x)
        return fake_quantize(x, self.compute_clip(x, signed), self.num_bits, signed=signed, gradient=self.gradient)

    def extra_repr(self) -> str:
        signs = (True, False) if self.signed is None else (self.signed,)
        grid = " or ".join(str(list(integer_range(self.num_bits, signed))) for signed in signs)
        scalars = "per tensor" if self.dim is None else f"over dim {self.dim}"
        return f"{self.num_bits} bits {grid}, clip={self.clip} {scalars}, gradient={self.gradient}"
