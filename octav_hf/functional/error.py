"""The quantization error of a clip, measured with the two's-complement grid instead of modelled."""

import torch
from torch import Tensor

from .all_ranks import AllRanks
from .grid import round_to_grid
from .rows import Dim, check_floating, magnitude, to_rows


@torch.no_grad()
def quantization_error(x: Tensor, clip: Tensor, num_bits: int, *, signed: bool = True, dim: Dim = None) -> Tensor:
    """Measured mean squared error of quantizing ``x`` with ``clip``, relative to ``max|x|^2``.

    ``mean(((x - Q(x)) / max|x|)^2)`` neither overflows nor underflows; multiply by ``max|x|^2`` for the MSE itself.

    Args:
        x: floating point, any shape, finite.
        clip: clipping scalar(s), shaped as a clipping rule returns them for the same ``dim``.
        num_bits, signed: the grid.
        dim: dimension(s) averaged over; ``None`` for all.

    Returns:
        float32 (float64 for float64 input), shape of ``clip``; 0 where ``x`` is all zero or empty.
    """
    check_floating(x, "quantization_error")
    rows, shape = to_rows(x, dim)
    return rows_errors(rows, clip.reshape(1, -1), num_bits, signed)[0].reshape(shape)


def rows_errors(rows: Tensor, clips: Tensor, num_bits: int, signed: bool, ranks: AllRanks | None = None) -> Tensor:
    """``quantization_error`` of ``[rows, n]`` for ``clips``, ``[k, rows]``.

    With ``ranks``, of a single row that is distributed over the ranks; one collective.
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
    """Of two clips per row, the one with the lower measured error; the smaller if equal."""
    low, high = torch.minimum(first, second), torch.maximum(first, second)
    low_error, high_error = rows_errors(rows, torch.stack([low, high]), num_bits, signed, ranks)
    return torch.where(high_error < low_error, high, low)
