"""Rounding and its gradients by Triton, interpreted where there is no GPU, against the same in torch operations."""

from __future__ import annotations

import pytest
import torch

from octav_hf.functional import fake_quantize
from octav_hf.functional.fake_quantize import attenuate_outside, keep_inside, round_and_compare, round_to_levels
from octav_hf.functional.kernels import compilation, cuda, operations

pytest.importorskip("triton", reason="pip install triton")

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")  # NumPy, by which Triton interprets

Tensor = torch.Tensor
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAN = float("nan")
LAYOUTS = {
    "contiguous": lambda x: x,
    "heads": lambda x: x.transpose(1, 2),
    "key": lambda x: x.transpose(-1, -2),
    "every second": lambda x: x[..., ::2],
}
# Of the four dimensions, those along which clips vary.
CLIPS = {
    "one": (),
    "heads": (0, 1),
    "tokens": (0, 1, 2),
    "channels": (0, 1, 3),
    "batch and tokens": (0, 2),
    "last": (3,),
}
GRIDS = {"signed": None, "unsigned": None, "by a tensor, signed": True, "by a tensor, unsigned": False}


@pytest.fixture(autouse=True)
def path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces the fixture that takes every path: uses these kernels."""
    monkeypatch.delenv(compilation.SWITCH, raising=False)
    monkeypatch.setattr(cuda, "DEVICE_TYPES", (DEVICE,))
    monkeypatch.setitem(operations._kernels, DEVICE, cuda)


def operands(layout: str, clips: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Values with one NaN, their gradient, and clips, of which one is 0 if there are several."""
    generator = torch.Generator().manual_seed(0)
    x, grad = torch.randn(2, 2, 3, 6, 8, generator=generator).to(dtype)
    x[0, 0, 0, 0] = NAN
    x, grad = LAYOUTS[layout](x), LAYOUTS[layout](grad)
    varied = CLIPS[clips]
    shape = [size if dim in varied else 1 for dim, size in enumerate(x.shape)] if varied else []
    clip = torch.rand(shape, generator=generator) + 0.3
    if varied:
        clip.view(-1)[1] = 0
    return x.to(DEVICE), grad.to(DEVICE), clip.to(DEVICE)


def grid(name: str) -> tuple[int, int, Tensor | None]:
    sign = GRIDS[name]
    return (0, 15, None) if name == "unsigned" else (-8, 7, None if sign is None else torch.tensor(sign, device=DEVICE))


def assert_same(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("offset", [None, -0.17])
@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("clips", CLIPS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_bit_for_bit(layout: str, clips: str, name: str, offset: float | None) -> None:
    x, grad, clip = operands(layout, clips)
    low, high, signed = grid(name)
    start = None if offset is None else torch.tensor(offset, device=DEVICE)
    rounded, inside = round_and_compare.plain(x, clip, low, high, signed, start)
    got = cuda.round_and_compare(x, clip, low, high, signed, start)
    assert_same(got[0], rounded)
    assert torch.equal(got[1], inside)
    assert_same(cuda.round_to_levels(x, clip, low, high, signed, start), rounded)
    attenuated = attenuate_outside.plain(grad, x, clip, low, signed, start)
    assert_same(cuda.attenuate_outside(grad, x, clip, low, signed, start), attenuated)
    assert_same(cuda.keep_inside(grad, inside), keep_inside.plain(grad, inside))


@pytest.mark.parametrize("clips", ["one", "tokens"])
def test_half_precision(clips: str) -> None:
    x, grad, clip = operands("heads", clips, torch.float16)
    assert_same(cuda.round_to_levels(x, clip, -8, 7, None, None), round_to_levels.plain(x, clip, -8, 7, None, None))
    attenuated = attenuate_outside.plain(grad, x, clip, -8, None, None)
    assert_same(cuda.attenuate_outside(grad, x, clip, -8, None, None), attenuated)


def test_clips_of_more_dimensions_than_the_kernels_have() -> None:
    x = torch.randn(2, 3, 2, 3, 2, 3, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    clip = x.abs().amax(dim=(1, 3, 5), keepdim=True) / 2
    assert_same(cuda.round_to_levels(x, clip, -8, 7, None, None), round_to_levels.plain(x, clip, -8, 7, None, None))


def test_the_gradient_in_another_layout() -> None:
    x, grad, clip = operands("contiguous", "heads")
    other = grad.transpose(1, 2).contiguous().transpose(1, 2)
    inside = round_and_compare.plain(x, clip, -8, 7, None, None)[1]
    assert_same(cuda.keep_inside(other, inside), keep_inside.plain(grad, inside))
    expected = attenuate_outside.plain(grad, x, clip, -8, None, None)
    assert_same(cuda.attenuate_outside(other, x, clip, -8, None, None), expected)


def test_nothing_and_one_value() -> None:
    clip = torch.tensor(0.5, device=DEVICE)
    for x in (torch.empty(0, 3, dtype=torch.float32, device=DEVICE), torch.tensor(0.3, device=DEVICE)):
        assert_same(cuda.round_to_levels(x, clip, -8, 7, None, None), round_to_levels.plain(x, clip, -8, 7, None, None))


@pytest.mark.parametrize("gradient", ["ste", "pwl", "mad"])
def test_fake_quantization_uses_them(gradient: str, monkeypatch: pytest.MonkeyPatch) -> None:
    used = []
    for name in ("round_to_levels", "round_and_compare", "keep_inside", "attenuate_outside"):
        kernel = getattr(cuda, name)
        monkeypatch.setattr(cuda, name, lambda *all, name=name, kernel=kernel: used.append(name) or kernel(*all))
    x, grad, clip = operands("contiguous", "heads")
    x.requires_grad_()
    fake_quantize(x, clip, 4, gradient=gradient).backward(grad)
    expected = {
        "ste": ["round_to_levels"],
        "pwl": ["round_and_compare", "keep_inside"],
        "mad": ["round_to_levels", "attenuate_outside"],
    }
    assert used == expected[gradient]
