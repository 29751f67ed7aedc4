"""Recognize weights that are sharded over processes."""

from torch import Tensor
from torch.distributed.fsdp import FlatParameter
from torch.distributed.tensor import DTensor


def sharded_shape(weight: Tensor) -> tuple[int, ...] | None:
    """The full shape of a sharded weight; ``None`` if the weight is complete in this process.

    FSDP2 shards into a ``DTensor``. DeepSpeed's ZeRO-3 leaves an empty tensor with ``ds_shape`` while the weight is not
    in use.
    """
    if isinstance(weight, DTensor | FlatParameter):
        return tuple(weight.shape)
    whole = getattr(weight, "ds_shape", None)
    return tuple(whole) if whole is not None and tuple(weight.shape) != tuple(whole) else None
