"""Frozen clips, with or without a learned correction."""

from collections.abc import Hashable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .._utils.torch_private import has_values, version_counter
from .function_modes import outside_function_modes

CORRECTION_RATE = 128.0
"""Derivative of the logarithm of a learned clip with respect to its parameter; part of the checkpoint format.

Adam changes a parameter by at most about the learning rate per step: a clip by 1.3 % at 1e-4, and by a factor of up to
2.2 in a short run whose learning rates add up to 0.006. When only the clips of a 4-bit MiniLM were trained to match the
float model's logits, they ended at 0.2 to 3 times the calibrated ones, half of them between 0.76 and 1.31. In such a
short run, 128 lowered the divergence by 18 %, 32 by 1 % and 512 by 10 %.
"""


class FrozenClips(NamedTuple):
    """The static grid of an operand.

    Args:
        signed: ``True`` for the two's-complement grid, ``False`` for the unsigned one.
        clips: in the units of the operand, ``[calls, *parts]``: one per matmul of the operand in one forward pass of
            its module, and per part if clips are granular. For a weight, in the shape that the clipping rule returns.
        offset: lowest value of an asymmetric grid, ``[]``, negative; ``None`` for other grids.
        correction: learned parameter with the shape of ``clips``, which are multiplied by ``exp(128 correction)``;
            ``None`` if clips are not learned.
    """

    signed: bool
    clips: Tensor
    offset: Tensor | None = None
    correction: Tensor | None = None

    @property
    def learning(self) -> "FrozenClips":
        """The same clips with a correction of 0, to be learned."""
        return self._replace(correction=torch.zeros_like(self.clips))

    @property
    def corrected(self) -> "FrozenClips":
        """The clips with the correction applied, as clips that are not learned."""
        if self.correction is None:
            return self
        clips = self.clips * torch.exp(CORRECTION_RATE * self.correction.detach())
        return self._replace(clips=clips, correction=None)

    def clip_of(self, call_index: int) -> Tensor:
        """The corrected clips of one call, ``[*parts]``, differentiable with respect to the correction."""
        clip = self.clips[call_index]
        return clip if self.correction is None else clip * torch.exp(CORRECTION_RATE * self.correction[call_index])


_read = WeakTensorKeyDictionary()  # tensor -> (version, values)


@outside_function_modes
def values_key(x: Tensor | None) -> Hashable:
    """A key that is equal for tensors of equal dtype, shape and values; the identity of a tensor without values.

    Values are read once, and again after an in-place write. Writes through ``.data`` are not detected, because they do
    not change the version counter.
    """
    if x is None or not has_values(x):
        return None if x is None else id(x)
    version = None if x.is_inference() else version_counter(x)
    known = _read.get(x)
    if known is None or known[0] != version:
        known = _read[x] = version, (x.dtype, tuple(x.shape), tuple(x.detach().flatten().tolist()))
    return known[1]
