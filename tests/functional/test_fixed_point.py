"""The fast search against the float64 Eq. 6, on large tensors of every awkward kind, and how often it reads them."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch

from octav_hf.functional import fixed_point, octav_clip
from tests import twins

from .conftest import only, params, take_path

Tensor = torch.Tensor
SIZE = 700_001  # samples of samples, and a remainder that fills no piece


@pytest.fixture(params=params("search", "triton", "compiled", "portable"), autouse=True)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The sizes as they are."""
    take_path(request.param, monkeypatch)
    return request.param


def random(size: int = SIZE) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(3))


def with_outlier(value: float) -> Tensor:
    x = random()
    x[123_456] = value
    return x


AWKWARD: dict[str, Callable[[], Tensor]] = {
    "cauchy": lambda: torch.from_numpy(np.random.default_rng(0).standard_cauchy(SIZE).astype(np.float32)),
    "log_normal": lambda: (3 * random()).exp(),
    "softmax": lambda: torch.softmax(4 * random(700_000).view(-1, 700), dim=-1),
    "mostly_zero": lambda: random() * (torch.arange(SIZE) % 5000 == 7),
    "padded_end": lambda: random() * (torch.arange(SIZE) < SIZE // 3),
    "sorted": lambda: random().sort().values,
    "only_the_sample_is_large": lambda: random() * torch.where(torch.arange(SIZE) % (1 << 15) < 1 << 11, 100.0, 1.0),
    "only_the_sample_is_zero": lambda: random() * torch.where(torch.arange(SIZE) % (1 << 15) < 1 << 11, 0.0, 1.0),
    "outlier_1e30": lambda: with_outlier(1e30),
    "outlier_-1e30": lambda: with_outlier(-1e30),
    "float32_max": lambda: with_outlier(torch.finfo(torch.float32).max),
    "sum_overflows": lambda: random().clamp(-3, 3) * 1e38,
    "tiny": lambda: random() * 1e-36,
    "subnormal": lambda: random() * 1e-41,
    "constant": lambda: torch.full((SIZE,), -0.3),
    "two_values": lambda: torch.where(torch.arange(SIZE) % 10 == 0, 3.0, 1.0),
    "integers": lambda: random().mul(3).round(),
    "a_few_levels": lambda: random().clamp(-2, 2).mul(7).round() / 7,
    "bfloat16": lambda: random().to(torch.bfloat16),
    "float16": lambda: random().to(torch.float16),
    "transposed": lambda: random(700_000).view(700, 1000).T,
    "negative": lambda: -random().abs(),
}


@functools.cache
def expected_clip(name: str, signed: bool, num_bits: int) -> float:
    return twins.octav_clip_twin(AWKWARD[name](), num_bits, signed)


@pytest.mark.parametrize(
    ("path", "num_bits"),
    # What Triton reads of a long row does not depend on the bits.
    [
        pytest.param(path, num_bits, marks=[pytest.mark.slow] if path in ("triton", "portable") else [])
        for path, num_bits in [("triton", 4), *itertools.product(("search", "compiled", "portable"), (2, 4, 8))]
    ],
    indirect=["path"],
)
@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
@pytest.mark.parametrize("name", AWKWARD)
def test_whole_tensor(name: str, signed: bool, num_bits: int) -> None:
    x = AWKWARD[name]()
    expected = expected_clip(name, signed, num_bits)
    got = octav_clip(x, num_bits, signed=signed)
    assert got.item() == pytest.approx(expected, rel=2e-5, abs=1.5e-45)
    assert torch.equal(octav_clip(x, num_bits, signed=signed), got)


@pytest.mark.parametrize("num_bits", [2, 4, 8])
@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
def test_rows_of_every_kind(signed: bool, num_bits: int, path: str) -> None:
    """Each row is its own twin, beside rows that are zero, constant, or of few values on which Eq. 6 alternates."""
    rows = [random(300 * 400).view(300, 400), torch.zeros(3, 400), torch.full((3, 400), 0.7)]
    rows += [random(100 * 400).view(100, 400).mul(3).round(), (2 * random(60 * 400)).exp().view(60, 400)]
    x = torch.cat(rows)[:: 19 if path == "triton" else 1]  # each row is a program to interpret
    got = octav_clip(x, num_bits, signed=signed, dim=1)
    expected = [twins.octav_clip_twin(row, num_bits, signed) for row in x]
    for row, clip, twin in zip(x, got.flatten().tolist(), expected, strict=True):
        if clip != pytest.approx(twin, rel=1e-5):
            # the two values of an alternation may tie
            errors = [twins.mse_twin(row, value, num_bits, signed) for value in (clip, twin)]
            assert errors[0] == pytest.approx(errors[1], rel=1e-6)


@pytest.mark.parametrize("shape", [(3, 40_000), (2, 3, 40_000), (40_000, 3)], ids=str)
def test_long_rows(shape: tuple[int, ...]) -> None:
    x = (2 * random(120_000 if len(shape) == 2 else 240_000)).sinh().view(shape)
    dim = shape.index(40_000)
    got = octav_clip(x, 4, dim=dim).flatten()
    rows = x.movedim(dim, -1).reshape(-1, 40_000)
    assert got.tolist() == pytest.approx([twins.octav_clip_twin(row, 4) for row in rows], rel=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
@pytest.mark.parametrize("dim", [None, 1])
def test_what_is_not_finite_is_refused(value: float, signed: bool, dim: int | None) -> None:
    x = with_outlier(value)[:700_000].view(25, 28_000)
    with pytest.raises(ValueError, match=r"\(25, 28000\).*1 (NaN|Inf)|0 NaN and 1 Inf"):
        octav_clip(x, 4, signed=signed, dim=dim)


@only("search")  # where Triton sums, it is read as often; the C++ is not asked
@pytest.mark.parametrize("num_bits", [4, 6, 8])
@pytest.mark.parametrize("name", ["softmax", "gaussian", "student_t"])
def test_a_large_tensor_is_read_a_few_times(name: str, num_bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its cost in a test that does not depend on the clock: reads of the whole tensor, and of samples."""
    x = random(1 << 22)
    if name == "softmax":
        x = torch.softmax(3 * x.view(-1, 256), dim=-1)
    elif name == "student_t":
        x = x / random(3 << 22).view(3, -1).square().mean(dim=0).sqrt()
    sizes = []
    read = fixed_point._Magnitudes._read

    def counted(self: fixed_point._Magnitudes, *arguments: object) -> object:
        sizes.append(self.numel)
        return read(self, *arguments)

    monkeypatch.setattr(fixed_point._Magnitudes, "_read", counted)
    fixed_point.fixed_points(x.view(1, -1), num_bits, signed=True)
    assert 2 <= sizes.count(x.numel()) <= 4
    assert sum(sizes) <= (sizes.count(x.numel()) + 0.2) * x.numel()
