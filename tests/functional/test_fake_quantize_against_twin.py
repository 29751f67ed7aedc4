"""fake_quantize against the float64 references: values, gradients, and memory for the backward pass."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from octav_hf.functional import fake_quantize
from tests import twins

from .conftest import both_roundings

pytestmark = both_roundings

Tensor = torch.Tensor

SIGNS = pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
GRADIENTS = pytest.mark.parametrize("gradient", ["ste", "pwl", "mad"])
DTYPES = pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.bfloat16, torch.float16, torch.float64],
    ids=["float32", "bfloat16", "float16", "float64"],
)
ROWS, COLUMNS = 12, 500
# An element this many steps from a rounding midpoint must come out right, float32's rounding being 128 * 2^-24 steps.
MIDPOINT = {torch.float32: 5e-5, torch.bfloat16: 5e-5, torch.float16: 5e-5, torch.float64: 1e-12}


def tensors(dtype: torch.dtype, per_row: bool) -> tuple[Tensor, Tensor]:
    """The clip, and values of which a third is outside it; some are negative, zero or exactly on the clip."""
    generator = torch.Generator().manual_seed(31)
    x = torch.randn(ROWS, COLUMNS, generator=generator, dtype=torch.float64)
    clip = torch.tensor(1.0371, dtype=torch.float64)
    if per_row:
        scale = 10.0 ** torch.linspace(-2, 2, ROWS, dtype=torch.float64).reshape(ROWS, 1)
        x, clip = x * scale, clip * scale
    clip = clip.to(torch.float64 if dtype == torch.float64 else torch.float32)
    x = x.to(dtype)
    x[:, 0] = 0.0
    if dtype in (torch.float32, torch.float64):  # elsewhere the clip is not a value of the dtype
        x[:, 1:2], x[:, 2:3] = clip, -clip
    return x, clip


def assert_within_rounding(got: Tensor, expected: np.ndarray, dtype: torch.dtype) -> None:
    """`got` equals `expected` up to two roundings in `dtype`."""
    assert got.dtype == dtype
    np.testing.assert_allclose(got.detach().double().numpy(), expected, rtol=4 * torch.finfo(dtype).eps, atol=0)


@DTYPES
@SIGNS
@pytest.mark.parametrize("per_row", [False, True], ids=["per_tensor", "per_row"])
@pytest.mark.parametrize("num_bits", range(2, 9))
def test_values_equal_the_twin(num_bits: int, per_row: bool, signed: bool, dtype: torch.dtype) -> None:
    """Eq. 2 and 3 on the two's-complement grid."""
    x, clip = tensors(dtype, per_row)
    got = fake_quantize(x, clip, num_bits, signed=signed)
    clear = twins.midpoint_distance_twin(x, clip, num_bits, signed) > MIDPOINT[dtype]
    assert clear.mean() > 0.99
    expected = twins.quantize_twin(x, clip, num_bits, signed)
    assert_within_rounding(got[torch.from_numpy(clear)], expected[clear], dtype)


@DTYPES
@GRADIENTS
@SIGNS
@pytest.mark.parametrize("per_row", [False, True], ids=["per_tensor", "per_row"])
def test_gradients_equal_the_twin(per_row: bool, signed: bool, gradient: str, dtype: torch.dtype) -> None:
    """grad_x = dQ/dx * grad, at every element: also at zeros, on the clip, below zero on an unsigned grid."""
    x, clip = tensors(dtype, per_row)
    x.requires_grad_()
    incoming = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(32)).to(dtype)
    for num_bits in (2, 4, 8):
        y = fake_quantize(x, clip, num_bits, signed=signed, gradient=gradient)
        (grad,) = torch.autograd.grad(y, x, incoming)
        factor = twins.gradient_twin(x, clip, signed, gradient)
        assert_within_rounding(grad, factor * twins.as_float64(incoming), dtype)


def test_the_default_gradient_is_mad() -> None:
    """fake_quantize(x, clip, bits) is signed and MAD."""
    x, clip = tensors(torch.float32, per_row=False)
    x.requires_grad_()
    (grad,) = torch.autograd.grad(fake_quantize(x, clip, 4).sum(), x)
    assert_within_rounding(grad, twins.gradient_twin(x, clip, True, "mad"), torch.float32)


@SIGNS
@pytest.mark.parametrize("per_row", [False, True], ids=["per_tensor", "per_row"])
def test_mad_is_the_derivative_of_its_surrogate(per_row: bool, signed: bool) -> None:
    """MAD cannot pass gradcheck; the surrogate of which it is the derivative does, and the two gradients agree."""
    x, clip = tensors(torch.float64, per_row)
    x = x[:, 3:13].contiguous().requires_grad_()
    assert torch.autograd.gradcheck(lambda t: twins.mad_surrogate(t, clip, signed), (x,))
    (expected,) = torch.autograd.grad(twins.mad_surrogate(x, clip, signed).sum(), x)
    (got,) = torch.autograd.grad(fake_quantize(x, clip, 4, signed=signed, gradient="mad").sum(), x)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)
    assert 0 < int((expected < 1).sum()) < expected.numel()


@GRADIENTS
def test_no_gradient_into_the_clip(gradient: str) -> None:
    """The clip gets no gradient."""
    x, clip = tensors(torch.float32, per_row=True)
    x.requires_grad_()
    clip.requires_grad_()
    fake_quantize(x, clip, 4, gradient=gradient).sum().backward()
    assert clip.grad is None
    assert x.grad is not None


@DTYPES
@SIGNS
@pytest.mark.parametrize("per_row", [False, True], ids=["per_tensor", "per_row"])
@pytest.mark.parametrize("num_bits", range(2, 9))
def test_idempotent_and_few_levels(num_bits: int, per_row: bool, signed: bool, dtype: torch.dtype) -> None:
    """Quantized twice is quantized once; at most 2^B levels, and at these sizes every one of them.

    A bfloat16 has 8 significant bits: beyond 64 steps its own spacing exceeds half a step, so levels merge or move.
    """
    x, clip = tensors(dtype, per_row)
    _, low, high = twins.grid_twin(1.0, num_bits, signed)
    once = fake_quantize(x, clip, num_bits, signed=signed)
    for row in once if per_row else [once]:
        assert row.unique().numel() <= 2**num_bits
    if dtype != torch.bfloat16 or max(-low, high) <= 64:
        assert torch.equal(fake_quantize(once, clip, num_bits, signed=signed), once)
        assert per_row or once.unique().numel() == 2**num_bits


@SIGNS
@pytest.mark.parametrize("num_bits", [2, 4, 8])
def test_ends_of_the_grid_and_ties(num_bits: int, signed: bool) -> None:
    """With step 1: ties to even, the highest level is one step below the clip, the lowest at -clip or 0."""
    _, low, high = twins.grid_twin(1.0, num_bits, signed)
    x = torch.arange(low - 4, high + 5, 0.25)
    clip = torch.tensor(float(2 ** (num_bits - 1) if signed else 2**num_bits))
    got = fake_quantize(x, clip, num_bits, signed=signed)
    assert got.tolist() == twins.quantize_twin(x, clip, num_bits, signed).tolist()
    assert (got.min().item(), got.max().item()) == (low, high)


@GRADIENTS
@SIGNS
@DTYPES
def test_zero_clip_gives_zeros(dtype: torch.dtype, signed: bool, gradient: str) -> None:
    """A tensor or row of zeros: zeros and finite gradients, never NaN."""
    x, clip = tensors(dtype, per_row=True)
    clip[3] = 0.0
    x.requires_grad_()
    for zero in (clip, torch.zeros_like(clip), torch.tensor(0.0)):
        y = fake_quantize(x, zero, 4, signed=signed, gradient=gradient)
        (grad,) = torch.autograd.grad(y.sum(), x)
        assert torch.cat([y, grad]).isfinite().all()
        rows = (zero == 0).expand(ROWS, 1).flatten()
        assert torch.equal(y[rows], torch.zeros_like(y[rows]))


@pytest.mark.parametrize("magnitude", [1e-40, 1e-37, 1e-30, 1e30, 3e38], ids=str)
@GRADIENTS
def test_ends_of_float32(gradient: str, magnitude: float) -> None:
    """Clips at the ends of float32: nothing overflows, underflows to NaN, or leaves [-s, s]."""
    x = (torch.randn(500, generator=torch.Generator().manual_seed(33)).clamp(-1.1, 1.1) * magnitude).requires_grad_()
    clip = torch.tensor(0.5 * magnitude)
    y = fake_quantize(x, clip, 4, gradient=gradient)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.cat([y, grad]).isfinite().all()
    error = (y.detach().double() - torch.from_numpy(twins.quantize_twin(x, clip, 4))).abs().max().item()
    clear = twins.midpoint_distance_twin(x, clip, 4).min() > 1e-4
    assert clear, "the seed has no element near a midpoint"
    assert error <= max(1e-6 * magnitude, 8 * 1.5e-45)
    np.testing.assert_allclose(grad.double(), twins.gradient_twin(x, clip, True, gradient), rtol=1e-6)


# --------------------------------------------------------------------------------------------------------------------
# memory
# --------------------------------------------------------------------------------------------------------------------


def saved_tensors(x: Tensor, clip: Tensor, signed: bool, gradient: str) -> list[Tensor]:
    """The tensors that autograd saves between forward and backward of fake_quantize."""
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = fake_quantize(x, clip, 4, signed=signed, gradient=gradient)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert_within_rounding(grad, twins.gradient_twin(x, clip, signed, gradient), x.dtype)
    return kept


@DTYPES
@SIGNS
@GRADIENTS
@pytest.mark.parametrize("per_row", [False, True], ids=["per_tensor", "per_row"])
def test_saved_for_backward(per_row: bool, gradient: str, signed: bool, dtype: torch.dtype) -> None:
    """ste saves nothing, pwl at most a byte per element, mad x itself (no copy) and the clip."""
    x, clip = tensors(dtype, per_row)
    x.requires_grad_()
    kept = saved_tensors(x, clip, signed, gradient)
    if gradient == "ste":
        assert kept == []
    elif gradient == "pwl":
        assert sum(math.prod(t.shape) * t.element_size() for t in kept) <= x.numel()
    else:
        for tensor in kept:
            assert tensor.data_ptr() == x.data_ptr() or tensor.numel() <= clip.numel()
        assert sum(tensor.numel() > clip.numel() for tensor in kept) <= 1
