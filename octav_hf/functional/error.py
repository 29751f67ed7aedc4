"""The error that a clip really gives: measured with the two's-complement grid, not modelled."""

import torch
from torch import Tensor

from .all_ranks import AllRanks
from .grid import round_to_grid
from .rows import Dim, check_floating, magnitude, to_rows


@torch.no_grad()
def quantization_error(x: Tensor, clip: Tensor, num_bits: int, *, signed: bool = True, dim: Dim = None) -> Tensor:
    """Measured mean squared error of quantizing ``x`` with ``clip``, relative to the square of its largest magnitude.

    Being relative it neither overflows nor underflows: ``mean(((x - Q(x)) / max|x|)^2)``. Multiply by ``max|x|^2`` for
    the MSE itself.

    Args:
        x: floating point, any shape, finite.
        clip: clipping scalar(s), of the shape that a clipping rule returns for the same ``dim``.
        num_bits, signed: the grid.
        dim: the dimension(s) averaged over; ``None`` for all.

    Returns:
        float32 (float64 for float64 input), the shape of ``clip``; 0 where ``x`` is all zero or empty.
    """
    check_floating(x, "quantization_error")
    rows, shape = to_rows(x, dim)
    return rows_error(rows, clip.reshape(-1), num_bits, signed).reshape(shape)


def rows_error(rows: Tensor, clip: Tensor, num_bits: int, signed: bool) -> Tensor:
    """``quantization_error`` of ``[rows, n]`` for one clip a row, ``[rows]``."""
    return rows_errors(rows, clip[None], num_bits, signed)[0]


def rows_errors(rows: Tensor, clips: Tensor, num_bits: int, signed: bool, ranks: AllRanks | None = None) -> Tensor:
    """``quantization_error`` of ``[rows, n]`` for k clips a row, ``[k, rows]``.

    With ``ranks`` those of one row, ``[1, n]``, of which each rank has a part; a collective, of one message.
    """
    if ranks is not None:
        peak = torch.full_like(clips[0], max(-ranks.low, ranks.high))[:, None]
    elif rows.numel() > 0:
        peak = magnitude(rows, signed=True).amax(dim=1, keepdim=True)
    else:
        return torch.zeros_like(clips)
    peak = torch.where(peak > 0, peak, 1)

    def squares(clip: Tensor) -> Tensor:
        return ((rows - round_to_grid(rows, clip[:, None], num_bits, signed=signed)) / peak).square_()

    if ranks is None:
        return torch.stack([squares(clip).mean(dim=1) for clip in clips])
    return ranks.sum(torch.stack([squares(clip).sum(dim=1) for clip in clips])) / ranks.numel


def lower_error(
    rows: Tensor, first: Tensor, second: Tensor, num_bits: int, signed: bool, ranks: AllRanks | None = None
) -> Tensor:
    """For each of ``[rows, n]`` that of the two clips with the lower measured error; of equal ones the smaller.

    With ``ranks`` for one row, ``[1, n]``, of which each rank has a part; a collective.
    """
    low, high = torch.minimum(first, second), torch.maximum(first, second)
    low_error, high_error = rows_errors(rows, torch.stack([low, high]), num_bits, signed, ranks)
    return torch.where(high_error < low_error, high, low)
