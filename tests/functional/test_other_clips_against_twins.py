"""max_clip, percentile_clip and mse_sweep_clip against their float64 references."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from octav_hf.functional import (
    fake_quantize,
    max_clip,
    mse_clip,
    mse_sweep_clip,
    octav_clip,
    percentile_clip,
    quantization_error,
    round_to_grid,
)
from octav_hf.functional.percentile import percentile_of_table
from tests import twins

from .conftest import any_path

pytestmark = any_path  # none of these rules has compiled code

SIGNS = pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])


def tensor(family: str, size: int = 3001) -> torch.Tensor:
    """Samples of a family, of a size that no percentile divides evenly."""
    return torch.from_numpy(twins.samples(family, size, seed=21))


@SIGNS
@pytest.mark.parametrize("family", twins.FAMILIES)
def test_max_equals_the_twin(family: str, signed: bool) -> None:
    """s = max|x|, of the positive part only if unsigned; a tensor and its rows."""
    x = tensor(family, 3000) - 0.5
    assert max_clip(x, 4, signed=signed).item() == twins.max_clip_twin(x, signed)
    rows = max_clip(x.reshape(6, 500), 4, signed=signed, dim=-1)
    assert rows.shape == (6, 1)
    assert rows.flatten().tolist() == [twins.max_clip_twin(row, signed) for row in x.reshape(6, 500)]


@SIGNS
@pytest.mark.parametrize("percentile", [50, 90, 99.9, 99.99, 99.999, 100], ids=str)
@pytest.mark.parametrize("family", twins.FAMILIES)
def test_percentile_equals_the_twin(family: str, percentile: float, signed: bool) -> None:
    """The nearest rank of |x| over all elements, zeros included: an element of the data, exactly."""
    x = tensor(family)
    expected = twins.percentile_clip_twin(x, percentile, signed)
    assert percentile_clip(x, 4, signed=signed, percentile=percentile).item() == expected


@pytest.mark.parametrize("size", [10, 1000, 30_000])
def test_percentile_at_a_rank_without_remainder(size: int) -> None:
    """99.9 % of 1000 elements is rank 999, not 1000, in spite of floating-point error."""
    x = torch.arange(1, size + 1, dtype=torch.float32)
    for percentile in (10, 70, 90, 99.9, 99.99):
        expected = twins.percentile_clip_twin(x, percentile)
        assert percentile_clip(x, 8, percentile=percentile).item() == expected


@SIGNS
@pytest.mark.parametrize("num_bits", [2, 4, 8])
@pytest.mark.parametrize("family", twins.FAMILIES)
def test_mse_sweep_equals_the_twin(family: str, num_bits: int, signed: bool) -> None:
    """The same of the 100 points, for a tensor and for rows."""
    x = tensor(family, 1200)
    expected = twins.mse_sweep_clip_twin(x, num_bits, signed)
    assert mse_sweep_clip(x, num_bits, signed=signed).item() == pytest.approx(expected, rel=1e-6)
    got = mse_sweep_clip(x.reshape(3, 400), num_bits, signed=signed, dim=1).flatten().tolist()
    assert got == pytest.approx([twins.mse_sweep_clip_twin(r, num_bits, signed) for r in x.reshape(3, 400)], rel=1e-6)


@pytest.mark.parametrize("signed", [torch.tensor(1.0), torch.tensor(1), torch.tensor([True])], ids=str)
@pytest.mark.parametrize("rule", [max_clip, mse_clip, octav_clip, percentile_clip])
def test_a_tensor_that_is_no_sign_is_refused(rule: Callable[..., torch.Tensor], signed: torch.Tensor) -> None:
    """Compiled code reads one byte of it, which is 0 in the 1.0 of a float."""
    with pytest.raises(ValueError, match="signed must be True, False or a bool tensor"):
        rule(torch.ones(5000), 4, signed=signed)


@pytest.mark.parametrize("function", [fake_quantize, round_to_grid, quantization_error])
def test_a_clip_that_is_a_number_is_refused(function: Callable[..., torch.Tensor]) -> None:
    with pytest.raises(
        TypeError, match=rf"^{function.__name__} \(clip\): expected a .* tensor, got float; write torch."
    ):
        function(torch.ones(3), 2.5, 4)


@SIGNS
@pytest.mark.parametrize("percentile", [0.001, 10, 50, 90, 99.9, 99.99, 100], ids=str)
@pytest.mark.parametrize("family", twins.FAMILIES)
def test_a_percentile_of_many_elements(family: str, percentile: float, signed: bool) -> None:
    """Percentiles from a magnitude table are in the twin's bin: the upper 16 bits are equal."""
    x = tensor(family, 100_001)
    expected = torch.tensor(twins.percentile_clip_twin(x, percentile, signed), dtype=torch.float32)
    got = percentile_clip(x, 4, signed=signed, percentile=percentile)
    # The upper edge of a bin is the lower one of the next.
    bins = [clip.view(torch.int32).item() / 2**16 for clip in (got, expected)]
    assert int(bins[1]) <= bins[0] <= int(bins[1]) + 1


@SIGNS
@pytest.mark.parametrize("percentile", [0.001, 50, 99.9, 99.999], ids=str)
def test_a_percentile_far_below_the_largest_value(percentile: float, signed: bool) -> None:
    """The outlier is 130 octaves above the other values, which fill more than 60 octaves."""
    x = torch.randn(50_000, generator=torch.Generator().manual_seed(0))
    x = torch.cat([1e-20 * x * torch.linspace(-20, 20, len(x)).exp(), torch.tensor([1e30])])
    expected = twins.percentile_clip_twin(x, percentile, signed)
    got = percentile_clip(x, 4, signed=signed, percentile=percentile)
    assert got.item() == pytest.approx(expected, rel=2**-7, abs=0)


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_bin_in_a_table_is_exact(default: torch.dtype) -> None:
    """For every default dtype; float32 cannot represent the rank for this many elements."""
    number = 123_456_789
    table = torch.zeros(2, 2, 1 << 15, dtype=torch.int64)
    for largest, expected in ((12_345, 0.0), (12_346, 5.0)):  # 99.99 % of them, rounded up, is all but 12345
        table[0, 0, 0], table[0, 0, 0x40A0] = number - largest, largest  # zeros, and values of 5
        before = torch.get_default_dtype()
        torch.set_default_dtype(default)
        try:
            assert percentile_of_table(table, 4, torch.tensor(True), percentile=99.99).item() == expected
        finally:
            torch.set_default_dtype(before)
