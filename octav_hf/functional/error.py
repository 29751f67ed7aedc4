"""The quantization error of a clip, measured on the grid itself (Eq. 4 models it)."""

import torch
from torch import Tensor

from .grid import round_to_grid
from .rows import Dim, Sign, check_floating, magnitude, to_rows


@torch.no_grad()
def quantization_error(x: Tensor, clip: Tensor, num_bits: int, *, signed: bool = True, dim: Dim = None) -> Tensor:
    """Measured mean squared error of quantizing ``x`` with ``clip``, relative to ``max|x|^2``.

    ``mean(((x - Q(x)) / max|x|)^2)`` neither overflows nor underflows; multiply by ``max|x|^2`` for the MSE itself.

    Args:
        x: floating point, any shape, finite.
        clip: clipping scalar(s), in the shape that a clipping rule returns for the same ``dim``.
        num_bits, signed: the grid, as in ``round_to_grid``.
        dim: dimension(s) to average over; ``None`` for all.

    Returns:
        float32 (float64 for float64 input), shape of ``clip``; 0 where ``x`` is all zero or empty.
    """
    check_floating(x, "quantization_error")
    check_floating(clip, "quantization_error (clip)")
    rows, shape = to_rows(x, dim)
    return rows_errors(rows, clip.reshape(1, -1), num_bits, signed)[0].reshape(shape)


def rows_errors(rows: Tensor, clips: Tensor, num_bits: int, signed: Sign) -> Tensor:
    """``quantization_error`` of each row of ``[rows, n]`` for each of its ``clips``, ``[k, rows]``: ``[k, rows]``."""
    if rows.numel() == 0:
        return torch.zeros_like(clips)
    peak = magnitude(rows, signed=True).amax(dim=1, keepdim=True)
    peak = torch.where(peak > 0, peak, 1)

    def error(clip: Tensor) -> Tensor:
        return ((rows - round_to_grid(rows, clip[:, None], num_bits, signed=signed)) / peak).square_().mean(dim=1)

    return torch.stack([error(clip) for clip in clips])
