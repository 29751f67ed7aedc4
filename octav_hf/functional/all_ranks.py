"""Statistics of a tensor that is distributed over the ranks of the default process group."""

import math

import torch
import torch.distributed as dist
from torch import Tensor

from .rows import Dim, not_finite_error


def several_ranks() -> bool:
    """Whether there is a default process group of more than one rank."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def check_whole(dim: Dim, operation: str) -> None:
    """Raise ``ValueError`` unless ``dim`` is ``None``: ranks share one clip for the whole tensor."""
    if dim is not None:
        raise ValueError(f"{operation}: with ranks there is one clip for the whole tensor; pass dim=None, not {dim!r}")


class AllRanks:
    """The range and size of the tensor whose parts are the ranks' ``x``, and sums over all parts.

    The constructor and ``sum`` are collectives. Results are bitwise equal on all ranks, so all take the same branches.
    NaN or Inf in a part raises ``ValueError`` on every rank, so that none waits for another.

    Args:
        x: this rank's part, floating point, any shape; may be empty.
        operation: the caller, for error messages.

    Attributes:
        low, high: lowest and highest value; 0 if all parts are empty.
        numel: total number of elements across ranks.
    """

    def __init__(self, x: Tensor, operation: str):
        self._device = x.device
        local = torch.stack(torch.aminmax(x)).tolist() if x.numel() else [math.inf, -math.inf]  # NaN propagates
        values = torch.tensor([*local, x.numel()], dtype=torch.float64, device=x.device)
        lows, highs, sizes = self._gather(values).unbind(dim=1)
        invalid = (sizes > 0) & ~(lows.isfinite() & highs.isfinite())
        if invalid.any():
            if not x.isfinite().all():
                raise not_finite_error(x, operation)
            ranks = ", ".join(map(str, invalid.nonzero().flatten().tolist()))
            raise ValueError(
                f"{operation}: the part of x on rank {ranks} holds NaN or Inf, so that there is no clipping scalar "
                "of all ranks; the error on that rank says more"
            )
        self.numel = int(sizes.sum())
        self.low, self.high = (float(lows.min()), float(highs.max())) if self.numel else (0.0, 0.0)

    def sum(self, values: Tensor) -> Tensor:
        """The elementwise sum of ``values`` (floating point, any shape) over the ranks, accumulated in float64."""
        return self._gather(values.flatten().double()).sum(dim=0).to(values).view_as(values)

    def _gather(self, values: Tensor) -> Tensor:
        """``values``, ``[k]``, of each rank: ``[ranks, k]`` on the CPU."""
        # Not reduced: one collective gives minima, maxima and sums, and every rank adds in the same order.
        values = values.to(self._device)
        gathered = [torch.empty_like(values) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, values)
        return torch.stack(gathered).cpu()
