"""A tensor of which each rank of the default process group has a part: what a clip needs to know of the whole."""

import math

import torch
import torch.distributed as dist
from torch import Tensor

from .rows import Dim, finite_range


def several_ranks() -> bool:
    """Whether there is a default process group of more than one rank."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def check_whole(dim: Dim, operation: str) -> None:
    """Refuse clips of several rows of a tensor of which each rank has a part."""
    if dim is not None:
        raise ValueError(f"{operation}: with ranks there is one clip for the whole tensor; pass dim=None, not {dim!r}")


class AllRanks:
    """The range and size of the tensor that the ranks' tensors ``x`` are parts of, and sums over all parts.

    To make one and to call ``sum`` are collectives: every rank of the default process group has to, in the same order.
    What comes back is the same on each rank, bit for bit, so that all take the same decisions.

    Args:
        x: this rank's part, floating point, of any shape; it may be empty.
        operation: who asks, for the error message.

    Attributes:
        low, high: lowest and highest value; 0 where all parts are empty.
        numel: number of elements of all parts.

    Raises:
        ValueError: a part holds NaN or Inf; on every rank, so that none waits for another.
    """

    def __init__(self, x: Tensor, operation: str):
        self._device = x.device
        own = torch.stack(torch.aminmax(x)).tolist() if x.numel() else [math.inf, -math.inf]  # NaN propagates
        lows, highs, sizes = self._gather(torch.tensor([*own, x.numel()], dtype=torch.float64)).unbind(dim=1)
        holds_values = sizes > 0
        wrong = holds_values & ~(lows.isfinite() & highs.isfinite())
        if wrong.any():
            finite_range(x, operation)  # raises where the values are
            ranks = ", ".join(map(str, wrong.nonzero().flatten().tolist()))
            raise ValueError(
                f"{operation}: the part of x on rank {ranks} holds NaN or Inf, so that there is no clipping scalar "
                "of all ranks; the error on that rank says more"
            )
        self.numel = int(sizes.sum())
        self.low, self.high = (float(lows.min()), float(highs.max())) if self.numel else (0.0, 0.0)

    def sum(self, values: Tensor) -> Tensor:
        """The sum of each of ``values`` (floating point, any shape) over the ranks, added up in float64."""
        return self._gather(values.flatten().double()).sum(dim=0).to(values).view_as(values)

    def _gather(self, values: Tensor) -> Tensor:
        """``values``, ``[k]``, of each rank: ``[ranks, k]`` on the CPU."""
        # Gathered instead of reduced: minima, maxima and sums in one collective, and added up in one order everywhere.
        values = values.to(self._device)
        gathered = [torch.empty_like(values) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, values)
        return torch.stack(gathered).cpu()
