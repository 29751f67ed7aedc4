"""Which weights are in other processes too, so that what is here of them is only a part."""

from torch import Tensor
from torch.distributed.fsdp import FlatParameter
from torch.distributed.tensor import DTensor


def sharded_shape(weight: Tensor) -> tuple[int, ...] | None:
    """The whole shape of a weight of which only a part, or nothing, is in this process; ``None`` for one that is whole.

    FSDP2 shards into a ``DTensor``; DeepSpeed's ZeRO-3 leaves an empty tensor, and notes the shape, while the weight is
    not in use.
    """
    if isinstance(weight, DTensor | FlatParameter):
        return tuple(weight.shape)
    whole = getattr(weight, "ds_shape", None)
    return tuple(whole) if whole is not None and tuple(weight.shape) != tuple(whole) else None
