"""Collectives over the default process group; a single process communicates nothing."""

import torch
import torch.distributed as dist
from torch import Tensor


def several_ranks() -> bool:
    """Whether the default process group has more than one rank."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def own_rank() -> int:
    """The rank of this process."""
    return dist.get_rank() if several_ranks() else 0


def gather(values: Tensor) -> Tensor:
    """``values`` of each rank, ``[ranks, *values.shape]``, by one collective."""
    if not several_ranks():
        return values.unsqueeze(0)
    gathered = [torch.empty_like(values) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, values)
    return torch.stack(gathered)


def sum_over_ranks(counts: Tensor) -> Tensor:
    """Sum the integer tensor ``counts`` over ranks, in place, by one collective."""
    if several_ranks():
        dist.all_reduce(counts)
    return counts


def sum_and_gather(counts: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of the ranks' ``counts``, and ``values`` of each rank, by one collective.

    Args:
        counts: int64, any shape; the same on all ranks.
        values: float64 ``[k]``.

    Returns:
        The sum, of the shape of ``counts``, and ``[ranks, k]``; both bitwise equal on all ranks.
    """
    if not several_ranks():
        return counts, values.unsqueeze(0)
    # Each rank writes the bits of its values to its own row, which is 0 on the other ranks.
    rows = counts.new_zeros(dist.get_world_size(), len(values))
    rows.select(0, dist.get_rank()).copy_(values.view(torch.int64))
    message = sum_over_ranks(torch.cat([counts.flatten(), rows.flatten()]))
    total, gathered = message.split([counts.numel(), rows.numel()])
    return total.view_as(counts), gathered.view(torch.float64).view(rows.shape)
