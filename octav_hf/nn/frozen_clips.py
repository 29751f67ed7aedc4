"""Clips that no longer follow the data."""

from collections.abc import Hashable
from typing import NamedTuple

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .._utils.torch_private import has_values, version_counter
from .function_modes import outside_function_modes


class FrozenClips(NamedTuple):
    """The grid of an operand as calibration left it.

    Args:
        signed: the two's-complement grid, or the unsigned one.
        clips: in the units of the operand, one for each multiplication of it in one forward pass of its module, and for
            each part that has a clip of its own: ``[calls, *parts]``. Of a weight as the clipping rule gives them.
        offset: where an asymmetric grid begins, ``[]``, negative; ``None`` for other grids.
    """

    signed: bool
    clips: Tensor
    offset: Tensor | None = None


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
