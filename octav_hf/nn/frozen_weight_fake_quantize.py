"""The quantizer of a weight with frozen clips."""

import torch
from torch import Tensor

from ..functional import fake_quantize
from ..functional.rows import statistics_dtype, to_rows
from .fake_quantize import FakeQuantize
from .full_precision_buffers import FullPrecisionBuffers
from .recording import refuse_recording


class FrozenWeightFakeQuantize(FullPrecisionBuffers, FakeQuantize):
    """``FakeQuantize`` with stored clips, which replaces a weight's quantizer. NaN in the weight stays NaN.

    Args:
        quantizer: the weight's quantizer, whose settings are kept.
        clips: as the clipping rule gives them for the weight, ``[rows, 1, ...]`` or 0-dim; a buffer.
    """

    clips: Tensor

    def __init__(self, quantizer: FakeQuantize, clips: Tensor):
        super().__init__(**quantizer.init_kwargs)
        self.register_buffer("clips", clips)

    @classmethod
    def of(cls, quantizer: FakeQuantize, weight: Tensor) -> "FrozenWeightFakeQuantize":
        """With the clips of ``weight``; ``ValueError`` if it holds NaN or Inf."""
        return cls(quantizer, quantizer.compute_clip(weight.detach()).clone())

    @classmethod
    def to_load(cls, quantizer: FakeQuantize, weight: Tensor) -> "FrozenWeightFakeQuantize":
        """With uninitialized clips for ``weight``, whose values are not read."""
        _, shape = to_rows(weight, quantizer.dim)
        return cls(quantizer, torch.empty(shape, dtype=statistics_dtype(weight.dtype), device=weight.device))

    @property
    def is_frozen(self) -> bool:
        return True

    def compute_clip(self, x: Tensor, signed: bool | None = None) -> Tensor:
        return self.clips

    def forward(self, x: Tensor, call_index: int = 0) -> Tensor:
        """As in ``FakeQuantize``; ``x`` is the weight."""
        refuse_recording(self, x, dynamic=False)
        return fake_quantize(x, self.clips, self.num_bits, gradient=self.gradient_estimator)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, frozen"
