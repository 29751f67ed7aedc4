"""max_clip, percentile_clip and mse_sweep_clip against their float64 references."""

from __future__ import annotations

import pytest
import torch

from octav_hf.functional import max_clip, mse_sweep_clip, percentile_clip
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


@pytest.mark.parametrize("size", [10, 1000, 100_000])
def test_percentile_at_a_rank_without_remainder(size: int) -> None:
    """99.9 % of 1000 elements is rank 999, not 1000: no float error may tip it over."""
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
