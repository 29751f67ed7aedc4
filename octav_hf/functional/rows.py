"""What every clipping rule starts from: the tensor as rows, its magnitudes, and a check that they are finite."""

import math

import torch
from torch import Tensor

Dim = int | tuple[int, ...] | None


def check_floating(x: Tensor, operation: str) -> None:
    """Refuse integer, boolean and complex tensors, naming the operation and the tensor."""
    if not x.is_floating_point():
        raise TypeError(
            f"{operation}: x of shape {tuple(x.shape)} has dtype {x.dtype}; pass a floating-point tensor (x.float())"
        )


def finite_range(x: Tensor, operation: str) -> tuple[float, float]:
    """Lowest and highest value of ``x``, ``(0, 0)`` if it is empty; one read of the tensor.

    Raises:
        ValueError: ``x`` holds NaN or Inf: one such value would spread through the clip to every other.
    """
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
    """View ``x`` as ``[rows, n]``, one row per clipping scalar, with the reduced dimensions flattened into ``n``.

    Args:
        x: any shape.
        dim: the dimension(s) reduced; ``None`` reduces them all into a single row.

    Returns:
        The rows (a view wherever strides allow), and the shape that makes one value per row broadcastable against
        ``x``: reduced dimensions are kept with size 1; ``()`` for ``dim=None``.
    """
    if dim is None:
        # Order is of no matter here; in memory order a transposed tensor (an attention key) flattens without a copy.
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
    """``|x|``, or ``max(x, 0)`` on an unsigned grid, where a negative value becomes zero whatever the clip is.

    float16 and bfloat16 come back as float32, so that statistics never accumulate below it.
    """
    x = x.to(statistics_dtype(x.dtype))
    return x.abs() if signed else x.clamp(min=0)


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which clips are computed and kept: float32, or float64 for float64 input."""
    return torch.promote_types(dtype, torch.float32)
