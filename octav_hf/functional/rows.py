"""Shared by the clipping rules: a tensor as rows, its magnitudes, its range, and checks."""

import math

import torch
from torch import Tensor

Dim = int | tuple[int, ...] | None


def check_floating(x: Tensor, operation: str) -> None:
    """Raise ``TypeError`` for an integer, boolean or complex tensor."""
    if not x.is_floating_point():
        raise TypeError(
            f"{operation}: x of shape {tuple(x.shape)} has dtype {x.dtype}; pass a floating-point tensor (x.float())"
        )


def finite_range(x: Tensor, operation: str) -> tuple[float, float]:
    """Lowest and highest value of ``x``, ``(0, 0)`` if it is empty; ``ValueError`` if it holds NaN or Inf."""
    if x.numel() == 0:
        return 0.0, 0.0
    low, high = torch.stack(torch.aminmax(x)).tolist()  # NaN propagates
    if math.isfinite(low) and math.isfinite(high):
        return low, high
    nans, infs = int(torch.isnan(x).sum()), int(torch.isinf(x).sum())
    raise ValueError(
        f"{operation}: x of shape {tuple(x.shape)} and dtype {x.dtype} holds {nans} NaN and {infs} Inf, so it has no "
        "clipping scalar; find where they arise (an overflow in float16, a learning rate too high, a bad checkpoint), "
        "or replace them with torch.nan_to_num first"
    )


def to_rows(x: Tensor, dim: Dim) -> tuple[Tensor, tuple[int, ...]]:
    """View ``x`` as ``[rows, n]``, one row per clipping scalar, with the dimensions ``dim`` flattened into ``n``.

    Returns:
        The rows (a view if strides allow), and the shape in which one value per row broadcasts against ``x``: reduced
        dimensions have size 1; ``()`` for ``dim=None``, which reduces all.
    """
    if dim is None:
        # In memory order a transposed tensor, such as an attention key, flattens without a copy.
        return x.permute(memory_order(x)).reshape(1, -1), ()
    dims = (dim,) if isinstance(dim, int) else tuple(dim)
    for d in dims:
        if not -x.dim() <= d < x.dim():
            raise IndexError(f"dim {d} is out of range for x of shape {tuple(x.shape)}")
    reduced = sorted(d % x.dim() for d in dims)
    if not reduced or len(set(reduced)) != len(reduced):
        raise ValueError(f"dim {dim} must name one or more different dimensions of x of shape {tuple(x.shape)}")
    kept = [d for d in range(x.dim()) if d not in reduced]
    shape = tuple(1 if d in reduced else size for d, size in enumerate(x.shape))
    rows = math.prod(x.shape[d] for d in kept)
    columns = math.prod(x.shape[d] for d in reduced)
    return x.permute(*kept, *reduced).reshape(rows, columns), shape


def memory_order(x: Tensor) -> list[int]:
    """The dimensions of ``x`` from the slowest to the fastest in memory."""
    return sorted(range(x.dim()), key=x.stride().__getitem__, reverse=True)


def magnitude(x: Tensor, signed: bool) -> Tensor:
    """``|x|``, or ``max(x, 0)`` for an unsigned grid, in ``statistics_dtype``."""
    x = x.to(statistics_dtype(x.dtype))
    return x.abs() if signed else x.clamp(min=0)


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which clips are computed and kept: float32, or float64 for float64 input."""
    return torch.promote_types(dtype, torch.float32)
