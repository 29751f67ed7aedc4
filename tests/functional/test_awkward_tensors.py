"""octav_clip and mse_clip against the float64 twins, on large tensors and rows of every awkward kind."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import pytest
import torch

from octav_hf.functional import mse_clip, octav_clip
from tests import twins

Tensor = torch.Tensor
SIZE = 700_001  # several pieces, and a remainder that fills none
TABLE = 1e-4  # relative error of a clip that is a function of a magnitude table, which keeps no value itself


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
    "one_part_is_large": lambda: random() * torch.where(torch.arange(SIZE) % (1 << 15) < 1 << 11, 100.0, 1.0),
    "one_part_is_zero": lambda: random() * torch.where(torch.arange(SIZE) % (1 << 15) < 1 << 11, 0.0, 1.0),
    "outlier_1e30": lambda: with_outlier(1e30),
    "outlier_-1e30": lambda: with_outlier(-1e30),
    "float32_max": lambda: with_outlier(torch.finfo(torch.float32).max),
    "sum_overflows": lambda: random().clamp(-3, 3) * 1e38,
    "tiny": lambda: random() * 1e-36,
    "constant": lambda: torch.full((SIZE,), -0.3),
    "two_values": lambda: torch.where(torch.arange(SIZE) % 10 == 0, 3.0, 1.0),
    "integers": lambda: random().mul(3).round(),
    "a_few_levels": lambda: random().clamp(-2, 2).mul(7).round() / 7,
    "bfloat16": lambda: random().to(torch.bfloat16),
    "float16": lambda: random().to(torch.float16),
    "transposed": lambda: random(700_000).view(700, 1000).T,
    "negative": lambda: -random().abs(),
    "relu6": lambda: (2 * random() + 3).clamp(0, 6),
    "scaled_relu6": lambda: (2 * random() + 3).clamp(0, 6) * 0.37,
    "thirds": lambda: random().mul(3).round() / 3,
}


@functools.cache
def expected_clip(name: str, signed: bool, num_bits: int) -> float:
    return twins.octav_clip_twin(AWKWARD[name](), num_bits, signed)


@pytest.mark.parametrize("num_bits", [2, 4, 8])
@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
@pytest.mark.parametrize("name", AWKWARD)
def test_whole_tensor(name: str, signed: bool, num_bits: int) -> None:
    x = AWKWARD[name]()
    expected = expected_clip(name, signed, num_bits)
    got = octav_clip(x, num_bits, signed=signed)
    assert got.item() == pytest.approx(expected, rel=TABLE)


@pytest.mark.parametrize("num_bits", [2, 4, 8])
def test_values_of_a_single_bin(num_bits: int) -> None:
    """A table knows only their mean; the width of a bin is at most 2^-7 of its magnitude."""
    x = 1 + random() * 1e-4
    assert octav_clip(x, num_bits).item() == pytest.approx(twins.octav_clip_twin(x, num_bits), rel=2e-3)


def test_a_table_takes_what_is_below_2_to_the_minus_133_for_zero() -> None:
    """Tables count magnitudes in the lowest bin as zeros; short rows do not."""
    x = random() * 1e-42
    assert octav_clip(x, 4) == mse_clip(x, 4) == 0
    assert octav_clip(x[:1000], 4).item() == pytest.approx(twins.octav_clip_twin(x[:1000], 4), rel=1e-5, abs=1.5e-45)


@pytest.mark.parametrize("num_bits", [2, 4, 8])
@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
def test_rows_of_every_kind(signed: bool, num_bits: int) -> None:
    """Each row is its own twin, beside rows that are zero, constant, or of few values on which Eq. 6 alternates."""
    rows = [random(300 * 400).view(300, 400), torch.zeros(3, 400), torch.full((3, 400), 0.7)]
    rows += [random(100 * 400).view(100, 400).mul(3).round(), (2 * random(60 * 400)).exp().view(60, 400)]
    x = torch.cat(rows)
    got = octav_clip(x, num_bits, signed=signed, dim=1)
    expected = [twins.octav_clip_twin(row, num_bits, signed) for row in x]
    assert got.flatten().tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("shape", [(3, 40_000), (2, 3, 40_000), (40_000, 3)], ids=str)
def test_long_rows(shape: tuple[int, ...]) -> None:
    x = (2 * random(120_000 if len(shape) == 2 else 240_000)).sinh().view(shape)
    dim = shape.index(40_000)
    got = octav_clip(x, 4, dim=dim).flatten()
    rows = x.movedim(dim, -1).reshape(-1, 40_000)
    assert got.tolist() == pytest.approx([twins.octav_clip_twin(row, 4) for row in rows], rel=TABLE)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
@pytest.mark.parametrize("dim", [None, 1])
def test_what_is_not_finite_is_refused(value: float, signed: bool, dim: int | None) -> None:
    x = with_outlier(value)[:700_000].view(25, 28_000)
    with pytest.raises(ValueError, match=r"\(25, 28000\).*1 (NaN|Inf)|0 NaN and 1 Inf"):
        octav_clip(x, 4, signed=signed, dim=dim)
