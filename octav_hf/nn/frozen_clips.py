"""Clips that no longer follow the data."""

from collections.abc import Hashable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .._utils.torch_private import has_values, version_counter
from .function_modes import outside_function_modes

CORRECTION_RATE = 32.0
"""By how much the logarithm of a learned clip changes with its parameter; part of the format of checkpoints.

Adam moves a parameter by about the learning rate r a step, which is r / σ of a weight if σ is their standard deviation,
0.02 to 0.05 in Transformers' models, and 32 r of a clip: the two change equally fast, as in LSQ (section 2.2).
"""


class FrozenClips(NamedTuple):
    """The grid of an operand as calibration left it.

    Args:
        signed: the two's-complement grid, or the unsigned one.
        clips: in the units of the operand, one for each multiplication of it in one forward pass of its module, and for
            each part that has a clip of its own: ``[calls, *parts]``. Of a weight as the clipping rule gives them.
        offset: where an asymmetric grid begins, ``[]``, negative; ``None`` for other grids.
        correction: what was learned, in the shape of ``clips``, which are to be multiplied by ``exp(32 correction)``;
            ``None`` for clips that do not learn.
    """

    signed: bool
    clips: Tensor
    offset: Tensor | None = None
    correction: Tensor | None = None

    @property
    def learning(self) -> "FrozenClips":
        """The same clips, with a correction that is to be learned, 0 now."""
        return self._replace(correction=torch.zeros_like(self.clips))

    @property
    def corrected(self) -> "FrozenClips":
        """The clips with their correction, which do not learn."""
        if self.correction is None:
            return self
        clips = self.clips * torch.exp(CORRECTION_RATE * self.correction.detach())
        return self._replace(clips=clips, correction=None)

    def clip_of(self, call_index: int) -> Tensor:
        """The corrected clips of one call, ``[*parts]``; they have a gradient where the correction has."""
        clip = self.clips[call_index]
        return clip if self.correction is None else clip * torch.exp(CORRECTION_RATE * self.correction[call_index])


_read = WeakTensorKeyDictionary()  # tensor -> its version, and its values


@outside_function_modes
def values_key(x: Tensor | None) -> Hashable:
    """Equal for tensors of equal dtype, shape and values. They are read once, and again after an in-place write.

    A write through ``.data`` is not noticed, since it is not counted. Of a tensor without values, its identity.
    """
    if x is None or not has_values(x):
        return None if x is None else id(x)
    version = None if x.is_inference() else version_counter(x)
    known = _read.get(x)
    if known is None or known[0] != version:
        known = _read[x] = version, (x.dtype, tuple(x.shape), tuple(x.detach().flatten().tolist()))
    return known[1]
