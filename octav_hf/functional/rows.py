"""Helpers of the clipping rules: view a tensor as rows, magnitudes, signs, and checks."""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .kernels.operations import NotFinite, operation
from .table import LONG_ROW, magnitude_table, uses_table

_OfRows = Callable[..., Tensor]
Dim = int | tuple[int, ...] | None
Sign = bool | Tensor
"""Whether a grid is signed; a bool tensor ``[]`` on the device of the data if it is computed from them."""


def check_floating(x: Tensor, operation: str) -> None:
    """Raise ``TypeError`` for a number, and for an integer, boolean or complex tensor."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{operation}: expected a floating-point tensor, got {type(x).__name__}; write torch.tensor(…)")
    if not x.is_floating_point():
        raise TypeError(
            f"{operation}: x of shape {tuple(x.shape)} has dtype {x.dtype}; pass a floating-point tensor (x.float())"
        )


def not_finite_error(x: Tensor, operation: str) -> ValueError:
    """The error for a tensor with NaN or Inf."""
    nans, infs = int(torch.isnan(x).sum()), int(torch.isinf(x).sum())
    return ValueError(
        f"{operation}: x of shape {tuple(x.shape)} and dtype {x.dtype} holds {nans} NaN and {infs} Inf, so it has no "
        "clipping scalar; find where they arise (float16 overflow, too high a learning rate, a damaged checkpoint), or "
        "replace them with torch.nan_to_num first"
    )


def to_rows(x: Tensor, dim: Dim) -> tuple[Tensor, tuple[int, ...]]:
    """Reshape ``x`` to ``[rows, n]``, one row per clip, with the dimensions ``dim`` flattened into ``n``.

    Returns:
        The rows (a view if strides allow), and the shape in which one value per row broadcasts against ``x``: reduced
        dimensions have size 1; ``()`` for ``dim=None``, which reduces all dimensions.
    """
    if dim is None:
        return x.reshape(1, -1), ()
    dims = (dim,) if isinstance(dim, int) else tuple(dim)
    for d in dims:
        if not -x.dim() <= d < x.dim():
            raise IndexError(f"dim {d} is out of range for x of shape {tuple(x.shape)}")
    reduced = sorted(d % x.dim() for d in dims)
    if not reduced or len(set(reduced)) != len(reduced):
        raise ValueError(f"dim {dim} must name one or more different dimensions of x of shape {tuple(x.shape)}")
    kept = [d for d in range(x.dim()) if d not in reduced]
    rows = math.prod([x.shape[d] for d in kept])
    columns = math.prod([x.shape[d] for d in reduced])
    return x.permute(*kept, *reduced).reshape(rows, columns), shape_of_clips(x, dim)


def shape_of_clips(x: Tensor, dim: Dim) -> tuple[int, ...]:
    """The shape of the clips of ``x``, whose dimension(s) ``dim`` share a clip."""
    if dim is None:
        return ()
    reduced = [d % x.dim() for d in ((dim,) if isinstance(dim, int) else dim)]
    return tuple(1 if d in reduced else size for d, size in enumerate(x.shape))


def memory_order(x: Tensor) -> list[int]:
    """The dimensions of ``x``, sorted by decreasing stride."""
    return sorted(range(x.dim()), key=x.stride().__getitem__, reverse=True)


def flat_rows(rows: Tensor) -> Tensor:
    """Flatten ``[rows, ...]`` to ``[rows, n]``; long rows in memory order, without a copy.

    A magnitude table does not depend on the order of the elements. The float sums of a short row do, so their elements
    are always in the order of the dimensions.
    """
    if rows.dim() > 2 and rows.numel() >= LONG_ROW * len(rows):
        rows = rows.permute(0, *(d + 1 for d in memory_order(rows[0])))
    return rows if rows.dim() == 2 else rows.reshape(len(rows), -1)


def clips_of(
    operation: Any, x: Tensor, dim: Dim, num_bits: int, signed: Sign, skip: Tensor | None, *options: Any, name: str
) -> Tensor:
    """The clips of ``x`` by an ``operation_of_rows``, in a shape that broadcasts to ``x``.

    Args:
        name: name of the rule, for errors.
    """
    if isinstance(signed, Tensor) and (signed.dtype != torch.bool or signed.dim() > 0):
        raise ValueError(
            f"{name}: signed must be True, False or a bool tensor of shape (), got a tensor of shape "
            f"{tuple(signed.shape)} and dtype {signed.dtype}"
        )
    x = x.detach()
    # The operation itself flattens a whole tensor: during compilation, the memory order is not known yet.
    rows, shape = (x.unsqueeze(0), ()) if dim is None else to_rows(x, dim)
    if rows.numel() == 0:
        return torch.zeros(shape, dtype=statistics_dtype(x.dtype), device=x.device)
    if not isinstance(signed, Tensor):
        signed = torch.full((), signed, dtype=torch.bool, device=x.device)
    if torch.compiler.is_compiling():  # a try block would break the graph
        return operation(rows, num_bits, signed, skip, False, *options).reshape(shape)
    try:
        return operation(rows, num_bits, signed, skip, True, *options).reshape(shape)
    except NotFinite:
        raise not_finite_error(x, name) from None


def operation_of_rows(of_table: Callable[..., Tensor] | None = None, options: str = "") -> Callable[[_OfRows], Any]:
    """Decorator: make a custom operation of ``of_rows(rows, num_bits, signed, *options)`` for ``[rows, n]``.

    The operation is ``(rows, num_bits, signed, skip, check, *options) -> clips``. It takes ``[rows, ...]`` and returns
    ``[rows]`` in ``statistics_dtype``, 0 if ``skip`` (bool ``[]`` or ``None``) is true. The clip of a row with NaN or
    Inf is NaN; with ``check``, ``NotFinite`` is raised on the CPU.

    Args:
        of_table: the same rule for a magnitude table, used for long rows.
        options: schema of the options.
    """

    def declare(of_rows: _OfRows) -> Any:
        @functools.wraps(of_rows)
        def run(rows: Tensor, num_bits: int, signed: Tensor, skip: Tensor | None, check: bool, *options: Any) -> Tensor:
            if of_table is not None and uses_table(rows):
                clips = torch.stack([of_table(magnitude_table(row), num_bits, signed, *options) for row in rows])
            else:
                clips = of_rows(rows, num_bits, signed, *options).to(statistics_dtype(rows.dtype))
            if skip is not None:
                clips = torch.where(skip, 0, clips)
            if check and clips.device.type == "cpu" and bool(clips.isnan().any()):
                raise NotFinite
            return clips

        schema = f"(Tensor rows, int num_bits, Tensor signed, Tensor? skip, bool check{options}) -> Tensor"
        return operation(schema, _empty_clips, flat_rows)(run)

    return declare


def _empty_clips(rows: Tensor, *_: Any) -> Tensor:
    return torch.empty(rows.shape[0], dtype=statistics_dtype(rows.dtype), device=rows.device)


def scaled_magnitudes(rows: Tensor, signed: Tensor) -> tuple[Tensor, Tensor]:
    """Magnitudes of ``[rows, n]`` in units ``[rows, 1]``, powers of two near the largest value of a row; and the units.

    Both are float64. The units keep sums from overflowing. The unit of a row with NaN or Inf is NaN.
    """
    rows = rows.double()
    largest = rows.abs().amax(dim=1, keepdim=True)
    unit = torch.where(largest == 0, 1.0, largest)
    unit = unit / (2 * torch.frexp(unit).mantissa)
    return magnitude(rows, signed) / unit, unit


def magnitude(x: Tensor, signed: Sign) -> Tensor:
    """``|x|``, or ``max(x, 0)`` for an unsigned grid, in ``statistics_dtype``."""
    x = x.to(statistics_dtype(x.dtype))
    if isinstance(signed, Tensor):
        return torch.where(signed, x.abs(), x.clamp(min=0))
    return x.abs() if signed else x.clamp(min=0)


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which clips are computed and kept: float32, or float64 for float64 input."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@operation("(Tensor x) -> Tensor", lambda x: torch.empty((), dtype=torch.bool, device=x.device))
def has_negative(x: Tensor) -> Tensor:
    """Whether any value of ``x`` (floating point, any shape) is negative: bool ``[]``."""
    return (x < 0).any()


def _empty_difference(x: Tensor, offset: Tensor, skip: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=offset.dtype, device=x.device)


@operation("(Tensor x, Tensor offset, Tensor skip) -> Tensor", _empty_difference)
def minus_offset(x: Tensor, offset: Tensor, skip: Tensor) -> Tensor:
    """``x - offset`` in the dtype of ``offset``, ``[]``; unspecified if ``skip`` is true, and then free on the CPU."""
    difference = _empty_difference(x, offset, skip)
    if x.device.type != "cpu" or not skip:
        torch.sub(x.to(offset.dtype), offset, out=difference)  # in a narrower dtype it would lose precision
    return difference
