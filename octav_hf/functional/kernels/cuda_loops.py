"""Rounding and its gradients on a CUDA device, by the kernels in ``triton_loops.py``.

Functions have the arguments and results of their namesakes in ``fake_quantize.py``. A training step makes hundreds of
these calls; a launch takes a third to a half of the host time of a ``torch.compile`` function.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from .fused import in_loops

_BLOCK = 1024  # elements of a program
_MAX_DIMS = 4


def round_to_levels(
    x: Tensor, clip: Tensor, low: int, high: int, signed: Tensor | None, offset: Tensor | None
) -> Tensor:
    (x,), clip, dims = _loops(clip, x)
    result = torch.empty_like(x)
    _launch("round_values", (x, clip, low, high, signed, offset, result, None), dims)
    return result


def round_and_compare(
    x: Tensor, clip: Tensor, low: int, high: int, signed: Tensor | None, offset: Tensor | None
) -> tuple[Tensor, Tensor]:
    (x,), clip, dims = _loops(clip, x)
    result, is_inside = torch.empty_like(x), torch.empty_like(x, dtype=torch.uint8)
    _launch("round_values", (x, clip, low, high, signed, offset, result, is_inside), dims)
    return result, is_inside


def keep_inside(grad: Tensor, inside: Tensor) -> Tensor:
    if grad.stride() != inside.stride():
        grad, inside = grad.contiguous(), inside.contiguous()
    result = torch.empty_like(grad)
    _launch("keep_inside", (grad, inside, result))
    return result


def attenuate_outside(
    grad: Tensor, x: Tensor, clip: Tensor, low: int, signed: Tensor | None, offset: Tensor | None
) -> Tensor:
    (grad, x), clip, dims = _loops(clip, grad, x)
    result = torch.empty_like(grad)
    _launch("attenuate_outside", (grad, x, clip, low, signed, offset, result), dims)
    return result


def _loops(clip: Tensor, *tensors: Tensor) -> tuple[tuple[Tensor, ...], Tensor, tuple[Any, ...]]:
    """Tensors with equal strides, the clips in the same memory order, and the dimensions for the kernels.

    The dimensions are ``(sizes of the last three, number of dimensions, whether clips vary along the last one)``.
    Neighbouring dimensions are merged, so clips vary along every other one.
    """
    loops = in_loops(tensors, (clip,))
    if loops is None:
        tensors = tuple(tensor.contiguous() for tensor in tensors)
        loops = in_loops(tensors, (clip,))
        assert loops is not None
    (viewed, *_), (clip,) = loops
    if clip.dim() > _MAX_DIMS:
        viewed, clip = viewed.flatten(), clip.expand(viewed.shape).flatten()
    sizes = viewed.shape[::-1] if clip.dim() else ()
    inner = (*sizes, 1, 1, 1)[:3]
    return tensors, clip.contiguous().to(viewed.device), (inner, max(1, len(sizes)), bool(sizes) and clip.shape[-1] > 1)


def _launch(name: str, arguments: tuple[Any, ...], dims: tuple[Any, ...] | None = None) -> None:
    x = arguments[0]
    numel = x.numel()
    if not numel:
        return
    is_wide = numel > 2**31 - _BLOCK
    sizes, of_clips = ((), ()) if dims is None else (dims[0], dims[1:])
    with torch.cuda.device_of(x):
        kernel = getattr(_triton_loops(), name)[(-(-numel // _BLOCK),)]
        kernel(*arguments, *sizes, numel, is_wide, _BLOCK, *of_clips, num_warps=4, enable_fp_fusion=False)


@cache
def _triton_loops() -> Any:
    from . import triton_loops

    return triton_loops
