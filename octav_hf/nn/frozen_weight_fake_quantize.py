"""The quantizer of a weight whose clips no longer follow it."""

import torch
from torch import Tensor

from ..functional import fake_quantize
from ..functional.rows import statistics_dtype, to_rows
from .fake_quantize import FakeQuantize
from .full_precision_buffers import FullPrecisionBuffers
from .recording import refuse_recording


class FrozenWeightFakeQuantize(FullPrecisionBuffers, FakeQuantize):
    """``FakeQuantize`` with stored clips, replacing a weight's quantizer, whose settings it keeps.

    The weight is not read: NaN stays NaN, without an error.

    Args:
        quantizer: the weight's quantizer.
        clips: as the clipping rule gives them for the weight: ``[rows, 1, ...]``, or 0-dim.

    Attributes:
        clips: buffer, of the dtype that it was given, whatever dtype the model is moved to.
    """

    clips: Tensor

    def __init__(self, quantizer: FakeQuantize, clips: Tensor):
        super().__init__(**quantizer.init_kwargs)
        self.register_buffer("clips", clips)

    @classmethod
    def of(cls, quantizer: FakeQuantize, weight: Tensor) -> "FrozenWeightFakeQuantize":
        """With the clips of ``weight`` as it is.

        Raises:
            ValueError: ``weight`` holds NaN or Inf; the message has the quantizer's name.
        """
        return cls(quantizer, quantizer.compute_clip(weight.detach()).clone())

    @classmethod
    def to_load(cls, quantizer: FakeQuantize, weight: Tensor) -> "FrozenWeightFakeQuantize":
        """With clips that have shape, dtype and device, but no values yet; those of ``weight`` are not read."""
        _, shape = to_rows(weight, quantizer.dim)
        return cls(quantizer, torch.empty(shape, dtype=statistics_dtype(weight.dtype), device=weight.device))

    @property
    def is_frozen(self) -> bool:
        """True."""
        return True

    def compute_clip(self, x: Tensor, signed: bool | None = None) -> Tensor:
        """The stored clips; ``x`` is not read."""
        return self.clips

    def forward(self, x: Tensor, call_index: int = 0) -> Tensor:
        """``x``, the weight, on the grid; same shape and dtype.

        Raises:
            RuntimeError: the call is being recorded by ``torch.jit.trace`` or ``torch.fx``.
        """
        refuse_recording(self, x, dynamic=False)
        return fake_quantize(x, self.clips, self.num_bits, gradient=self.gradient_estimator)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, frozen"
