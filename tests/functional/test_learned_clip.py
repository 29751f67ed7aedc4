"""The LSQ gradient of a clip, against a float64 surrogate that has this derivative."""

from __future__ import annotations

import math

import pytest
import torch

from octav_hf.functional import fake_quantize, fake_quantize_learned_clip
from octav_hf.functional.learned_clip import round_and_locate, split_gradient

from .conftest import any_path, both_roundings

Tensor = torch.Tensor

BYTE_ERROR = 0.5 / 250  # in steps: what one byte leaves open of a rounding error


def data(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


class Surrogate:
    """A function of the clip where each element keeps its rounding error in steps, or the integer it is clipped to."""

    def __init__(self, x: Tensor, clip: Tensor, num_bits: int, signed: bool, offset: float):
        self.low, self.high = (-(2 ** (num_bits - 1)), 2 ** (num_bits - 1) - 1) if signed else (0, 2**num_bits - 1)
        self.value, self.offset = x - offset, offset
        steps = self.value / (clip / (self.high + 1))
        self.inside = (steps >= self.low) & (steps <= self.high)
        self.error, self.integer = steps.round() - steps, steps.clamp(self.low, self.high).round()

    def __call__(self, clip: Tensor) -> Tensor:
        step = clip / (self.high + 1)
        return torch.where(self.inside, self.value + self.error * step, self.integer * step) + self.offset


CASES = [
    pytest.param((), True, 0.0, id="signed"),
    pytest.param((), False, 0.0, id="unsigned"),
    pytest.param((), False, -0.4, id="asymmetric"),
    pytest.param((6, 1), True, 0.0, id="rows"),
    pytest.param((3, 1, 1), False, 0.0, id="heads"),
]


@both_roundings
@pytest.mark.parametrize(("parts", "signed", "offset"), CASES)
@pytest.mark.parametrize("num_bits", [2, 4, 8])
@pytest.mark.parametrize("gradient", ["ste", "pwl", "mad"])
def test_the_gradient_of_the_clip(
    parts: tuple[int, ...], signed: bool, offset: float, num_bits: int, gradient: str
) -> None:
    x, weights = data(5, 3, 6, 40), data(5, 3, 6, 40, seed=1)
    clip = (0.7 + 0.2 * data(*parts, seed=2).abs()).requires_grad_()
    begin = None if offset == 0 else torch.tensor(offset, dtype=torch.float64)
    result = fake_quantize_learned_clip(x, clip, num_bits, signed=signed, offset=begin, gradient=gradient)
    (found,) = torch.autograd.grad((result * weights).sum(), clip)

    surrogate = Surrogate(x, clip.detach(), num_bits, signed, offset)
    torch.testing.assert_close(surrogate(clip).detach(), result.detach(), rtol=0, atol=1e-12)
    assert torch.autograd.gradcheck(lambda c: (surrogate(c) * weights).sum(), clip)
    (expected,) = torch.autograd.grad((surrogate(clip) * weights).sum(), clip)
    elements = 3 * 6 * 40 // clip.numel()  # of one batch element that share a clip
    scale = 1 / math.sqrt(elements * surrogate.high)
    assert found.shape == clip.shape
    worst = BYTE_ERROR * weights.abs().sum_to_size(clip.shape) / (surrogate.high + 1)
    assert ((found / scale - expected).abs() <= worst).all()
    assert (found / scale - expected).abs().max() < 0.02 * expected.abs().max()


@any_path
@pytest.mark.parametrize("batch", [1, 4])
def test_micro_batches_add_up_to_the_batch(batch: int) -> None:
    x, clip = data(8, 6, 10), torch.tensor(0.9, dtype=torch.float64, requires_grad=True)
    for part in x.chunk(batch):
        fake_quantize_learned_clip(part, clip, 4).square().sum().backward()
    accumulated, clip.grad = clip.grad, None
    fake_quantize_learned_clip(x, clip, 4).square().sum().backward()
    torch.testing.assert_close(accumulated, clip.grad)


@both_roundings
@pytest.mark.parametrize(("parts", "signed", "offset"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("gradient", ["ste", "pwl", "mad"])
def test_everything_else_is_that_of_fake_quantize(
    parts: tuple[int, ...], signed: bool, offset: float, dtype: torch.dtype, gradient: str
) -> None:
    """Large enough for the compiled loops."""
    values, weights = (data(5, 3, 6, 400, dtype=dtype, seed=seed) for seed in (0, 1))
    clip = (0.7 + 0.2 * data(*parts, seed=2).abs()).float()
    begin = None if offset == 0 else torch.tensor(offset)
    results, gradients = [], []
    for quantize, learned in ((fake_quantize, False), (fake_quantize_learned_clip, True)):
        x, own = values.clone().requires_grad_(), clip.clone().requires_grad_(learned)
        results.append(quantize(x, own, 4, signed=signed, offset=begin, gradient=gradient))
        results[-1].backward(weights)
        gradients.append(x.grad)
    assert results[1].dtype == dtype
    assert torch.equal(results[0], results[1])
    assert torch.equal(gradients[0], gradients[1])
    assert own.grad.dtype == torch.float32


@any_path
def test_compiled_loops_are_the_functions() -> None:
    x, grad = data(64, 1024, dtype=torch.float32), data(64, 1024, dtype=torch.float32, seed=1)
    grid = torch.tensor(0.8), -8, 7, None, None
    rounded, place = round_and_locate(x, *grid)
    expected, expected_place = round_and_locate.plain(x, *grid)
    assert torch.equal(rounded, expected)
    assert (place.int() - expected_place.int()).abs().max() <= 1  # a product in the place of a division
    change = grad, place, -8, 7, None, torch.float32
    for found, wanted in zip(split_gradient(*change), split_gradient.plain(*change), strict=True):
        assert torch.equal(found, wanted)


@any_path
def test_a_sign_that_is_a_tensor() -> None:
    x = data(4, 50)
    for signed in (True, False):
        clips = [torch.tensor(0.8, dtype=torch.float64, requires_grad=True) for _ in range(2)]
        for sign, clip in zip((signed, torch.tensor(signed)), clips, strict=True):
            fake_quantize_learned_clip(x, clip, 4, signed=sign).square().sum().backward()
        torch.testing.assert_close(clips[0].grad, clips[1].grad)


@any_path
@pytest.mark.parametrize("gradient", ["ste", "pwl", "mad"])
def test_extremes(gradient: str) -> None:
    """A clip of 0, data outside the clip only, one number, and no numbers."""
    for values, clip_value in ((data(3, 4), 0.0), (data(3, 4) + 100, 0.5), (data(), 0.5), (data(0, 4), 0.5)):
        x, clip = values.requires_grad_(), torch.tensor(clip_value, dtype=torch.float64, requires_grad=True)
        fake_quantize_learned_clip(x, clip, 4, gradient=gradient).sum().backward()
        assert clip.grad.isfinite()
        assert x.grad.isfinite().all()


@any_path
def test_the_clip_that_gives_the_least_error_is_found() -> None:
    """Gradient descent on the squared error ends near the minimum of a fine sweep, from both sides."""
    x = data(20_000)
    sweep = torch.linspace(0.2, 6, 2000, dtype=torch.float64)
    best = min(float((fake_quantize(x, clip, 4) - x).square().mean()) for clip in sweep)
    for begin in (0.6, 6.0):
        logarithm = torch.tensor(math.log(begin), dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.Adam([logarithm], lr=0.05)
        for _ in range(150):
            optimizer.zero_grad()
            loss = (fake_quantize_learned_clip(x, logarithm.exp(), 4) - x).square().mean()
            loss.backward()
            optimizer.step()
        assert float(loss.detach()) < 1.02 * best


@any_path
def test_errors_are_those_of_fake_quantize() -> None:
    with pytest.raises(ValueError, match=r"clip of shape \(2,\) cannot be broadcast to x of shape \(5, 3\)"):
        fake_quantize_learned_clip(data(5, 3), torch.ones(2), 4)
    with pytest.raises(TypeError, match="dtype torch.int64"):
        fake_quantize_learned_clip(torch.ones(3, dtype=torch.int64), torch.ones(()), 4)
