"""mse_clip against a sweep of 1000 clips, whose errors are measured in float64."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import pytest
import torch

from octav_hf.functional import fake_quantize, mse_clip, octav_clip
from tests import twins

Array = np.ndarray
SIZE = 20_000


def rng() -> np.random.Generator:
    return np.random.default_rng(7)


def softmax(spread: float) -> Array:
    exponentials = np.exp(spread * rng().standard_normal((SIZE // 80, 80)))
    return (exponentials / exponentials.sum(axis=1, keepdims=True)).ravel()


def gelu() -> Array:
    x = torch.from_numpy(1.5 * rng().standard_normal(SIZE))
    return torch.nn.functional.gelu(x).numpy()


def outliers(count: int, size: float) -> Array:
    x = rng().standard_normal(SIZE)
    x[:count] = size
    return x


def mostly_zero() -> Array:
    generator = rng()
    return generator.standard_normal(SIZE) * (generator.random(SIZE) < 0.8)


def two_humps() -> Array:
    generator = rng()
    return 0.1 * generator.standard_normal(SIZE) + generator.choice([-1, 1], SIZE)


TENSORS: dict[str, tuple[bool, Callable[[], Array]]] = {
    **{family: (True, lambda family=family: twins.samples(family, SIZE, seed=7)) for family in twins.FAMILIES},
    "relu_unsigned": (False, lambda: twins.samples("relu_gaussian", SIZE, seed=7)),
    "gelu": (True, gelu),
    "softmax_soft": (False, lambda: softmax(2)),
    "softmax_sharp": (False, lambda: softmax(4)),
    "softmax_signed": (True, lambda: softmax(2)),
    "bimodal": (True, two_humps),
    "sparse": (True, mostly_zero),
    "outliers": (True, lambda: outliers(20, 60.0)),
    "one_far_outlier": (True, lambda: outliers(1, 1000.0)),
    "negative_on_unsigned": (False, lambda: rng().standard_normal(SIZE)),
}


@functools.cache
def tensor(name: str) -> torch.Tensor:
    return torch.from_numpy(TENSORS[name][1]().astype(np.float32))


@functools.cache
def lowest_error(name: str, num_bits: int) -> float:
    return twins.best_sweep_mse(tensor(name), num_bits, TENSORS[name][0])


@pytest.mark.parametrize("num_bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("name", TENSORS)
def test_its_error_is_nearly_the_lowest(name: str, num_bits: int) -> None:
    """At most 0.5 % above it, 0.2 % at 2 and 3 bits, by a magnitude table; 2 % as a row (5 % at 8 bits)."""
    x, signed = tensor(name), TENSORS[name][0]
    table = mse_clip(x.repeat(2), num_bits, signed=signed)
    assert (table.shape, table.dtype) == ((), torch.float32)
    limit = 1.005 if num_bits >= 4 else 1.002
    assert twins.mse_twin(x, float(table), num_bits, signed) <= limit * lowest_error(name, num_bits)
    row = mse_clip(x, num_bits, signed=signed)
    limit = 1.02 if num_bits < 8 else 1.05
    assert twins.mse_twin(x, float(row), num_bits, signed) <= limit * lowest_error(name, num_bits)


@pytest.mark.slow
@pytest.mark.parametrize("num_bits", [2, 4, 8])
@pytest.mark.parametrize(("signed", "dim"), [(True, 1), (False, 0), (True, (1, 2))], ids=str)
def test_rows(num_bits: int, signed: bool, dim: int | tuple[int, ...]) -> None:
    """One clip per row, for all strides; over all rows the error is nearly the lowest."""
    x = torch.from_numpy(twins.samples("laplace", 20 * 30 * 16, seed=3)).view(20, 30, 16)
    if not signed:
        x = x.abs()
    clips = mse_clip(x, num_bits, signed=signed, dim=dim)
    dims = (dim,) if isinstance(dim, int) else dim
    assert clips.shape == tuple(1 if d in dims else size for d, size in enumerate(x.shape))
    kept = [d for d in range(3) if d not in dims]
    rows = x.permute(*kept, *dims).flatten(len(kept)).flatten(0, len(kept) - 1)
    got = [twins.mse_twin(r, c, num_bits, signed) for r, c in zip(rows, clips.flatten().tolist(), strict=True)]
    best = [twins.best_sweep_mse(row, num_bits, signed, points=400) for row in rows[:40]]
    assert sum(got[:40]) <= 1.02 * sum(best)


ROWS: dict[str, tuple[bool, Callable[[], Array]]] = {
    "gaussian": (True, lambda: rng().standard_normal((15, 384))),
    "student": (True, lambda: rng().standard_t(3, (15, 384))),
    "gelu": (True, lambda: gelu().reshape(-1, 2000)),
    "longer": (True, lambda: rng().standard_normal((2, 10_000))),
    "relu": (False, lambda: np.maximum(rng().standard_normal((15, 384)), 0)),
    "softmax": (False, lambda: softmax(2).reshape(-1, 80)[:60]),
    "far_outliers": (True, lambda: np.hstack([rng().standard_normal((15, 380)), np.full((15, 4), 30.0)])),
}


@functools.cache
def rows_of(name: str) -> torch.Tensor:
    return torch.from_numpy(ROWS[name][1]().astype(np.float32))


@functools.cache
def lowest_error_of_rows(name: str, num_bits: int) -> float:
    """That of the sweep, which ends at the largest magnitude, or of the clip that has it as its highest level."""
    signed = ROWS[name][0]
    levels = 2 ** (num_bits - signed)
    return sum(
        min(
            twins.best_sweep_mse(row, num_bits, signed, points=600),
            twins.mse_twin(row, float(row.abs().max()) * levels / (levels - 1), num_bits, signed),
        )
        for row in rows_of(name)
    )


@pytest.mark.slow
@pytest.mark.parametrize("num_bits", [4, 5, 6, 7, 8])
@pytest.mark.parametrize("name", ROWS)
def test_short_rows(name: str, num_bits: int) -> None:
    """Few candidates are measured; over all rows, the error is nearly the lowest."""
    signed, x = ROWS[name][0], rows_of(name)
    clips = mse_clip(x, num_bits, signed=signed, dim=1).flatten().tolist()
    errors = [twins.mse_twin(row, clip, num_bits, signed) for row, clip in zip(x, clips, strict=True)]
    assert sum(errors) <= 1.02 * lowest_error_of_rows(name, num_bits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    x = torch.from_numpy(twins.samples("laplace", SIZE, seed=5)).to(dtype)
    clip = mse_clip(x, 4)
    assert clip.dtype == torch.promote_types(dtype, torch.float32)
    assert twins.mse_twin(x, float(clip), 4) <= 1.02 * twins.best_sweep_mse(x, 4)


@pytest.mark.slow
def test_a_large_tensor_is_judged_by_its_outliers_too() -> None:
    """Twenty outliers in a million elements, which sampling would miss: the minimum near OCTAV's clip is found."""
    x = torch.randn(1_000_000, generator=torch.Generator().manual_seed(0))
    for size in (60.0, 300.0):
        x[torch.arange(20) * 50_000] = size
        clips = [mse_clip(x, 4), octav_clip(x, 4)]
        ours, octav = (twins.mse_twin(x, float(clip), 4) for clip in clips)
        largest = float(x.abs().max())
        sweep = min(twins.mse_twin(x, largest * k / 400, 4) for k in [*range(1, 60), *range(60, 401, 10)])
        assert ours <= 1.02 * sweep
        assert ours <= octav


@pytest.mark.slow
@pytest.mark.parametrize("columns", [256, 384, 1000, 1024, 4096])
def test_the_sample_of_a_large_tensor_follows_no_period(columns: int) -> None:
    """A few columns are a hundred times as large as the others, wherever they are."""
    x = torch.randn(500_000 // columns, columns, generator=torch.Generator().manual_seed(columns))
    x[:, [3, columns // 2, columns - 2]] *= 100
    best = min(twins.mse_twin(x, 100 * k / 25, 4) for k in range(1, 150))
    assert twins.mse_twin(x, float(mse_clip(x, 4)), 4) <= 1.02 * best


def test_scale_sign_and_order_do_not_matter() -> None:
    """Powers of two scale the clip exactly, down to where squares would be subnormal and up to where they overflow."""
    x = torch.from_numpy(twins.samples("laplace", SIZE, seed=9))
    clip = mse_clip(x, 4)
    for exponent in (-90, -30, 30, 100):
        assert mse_clip(x * 2.0**exponent, 4) == clip * 2.0**exponent
    shuffled = x[torch.randperm(SIZE, generator=torch.Generator().manual_seed(0))]
    assert mse_clip(shuffled, 4).item() == pytest.approx(clip.item(), rel=1e-5)
    assert mse_clip(x.abs(), 4, signed=False).item() != pytest.approx(clip.item(), rel=1e-2)


@pytest.mark.parametrize("size", [1000, 20_000, 100_000])
def test_on_an_unsigned_grid_a_negative_value_counts_as_a_zero(size: int) -> None:
    """Most values are negative, so that their constant error could hide the differences."""
    x = torch.rand(size, generator=torch.Generator().manual_seed(size)) * 20 - 19
    clip, positive = mse_clip(x, 4, signed=False).item(), x.clamp(min=0)
    assert twins.mse_twin(positive, clip, 4, False) <= 1.02 * twins.best_sweep_mse(positive, 4, False, points=300)


def test_zeros_constants_and_nothing() -> None:
    x = torch.stack([torch.zeros(50), torch.full((50,), 3.0), -torch.full((50,), 3.0)])
    zero, positive, negative = mse_clip(x, 4, dim=1).flatten().tolist()
    assert zero == 0
    for value, clip in ((3.0, positive), (-3.0, negative)):
        assert twins.mse_twin(torch.full((50,), value), clip, 4) < 1e-4 * 9
    assert mse_clip(torch.zeros(0), 4) == 0
    assert mse_clip(torch.zeros(3, 0), 4, dim=1).tolist() == [[0], [0], [0]]
    assert mse_clip(-torch.ones(50), 4, signed=False) == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_refused(value: float) -> None:
    x = torch.ones(4, 50)
    x[2, 7] = value
    with pytest.raises(ValueError, match=r"mse_clip: x of shape \(4, 50\)"):
        mse_clip(x, 4, dim=1)
    with pytest.raises(ValueError, match=r"mse_clip: x of shape \(4, 50\)"):
        mse_clip(x, 4)
    with pytest.raises(TypeError, match=r"mse_clip: x of shape \(3,\) has dtype torch.int64"):
        mse_clip(torch.arange(3), 4)
    with pytest.raises(ValueError, match="num_bits"):
        mse_clip(torch.ones(3), 9)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("numel", [2000, 40000])
def test_no_rounded_value_overflows_float16(bits: int, numel: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = ((torch.rand(numel, generator=generator) * 2 - 1) * torch.finfo(torch.float16).max).half()
    x[0], x[1] = 65504, -65504
    assert fake_quantize(x, mse_clip(x, bits), bits).isfinite().all()
