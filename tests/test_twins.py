"""Tests of the references themselves, on which all other tests rely."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests import twins


def test_ten_updates_give_the_figure_of_the_notes() -> None:
    """8 bits, a million Gaussian samples: ten updates of s_1 stop at 3.909, the fixed point is 3.926."""
    x = twins.samples("gaussian", 10**6, seed=0)
    assert twins.octav_clip_twin(x, 8, max_iterations=10) == pytest.approx(3.909, abs=5e-4)
    assert twins.octav_clip_twin(x, 8) == pytest.approx(3.926, abs=5e-4)
    assert twins.octav_clip_twin(x, 8, max_iterations=9) < 3.85


@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
@pytest.mark.parametrize("num_bits", [4, 8])
def test_fixed_point_is_the_root_of_the_objective(num_bits: int, signed: bool) -> None:
    """Newton's fixed point and the bisection of the objective's derivative agree where Eq. 6 converges."""
    x = twins.samples("laplace", 20_000, seed=1)
    assert twins.octav_clip_twin(x, num_bits, signed) == pytest.approx(
        twins.octav_root_twin(x, num_bits, signed), rel=1e-9
    )


@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
@pytest.mark.parametrize("num_bits", [2, 4, 8])
def test_sorted_sweep_equals_the_obvious_one(num_bits: int, signed: bool) -> None:
    """best_sweep_mse's running sums give min(mse_twin) over the same clips."""
    x = twins.samples("gaussian", 500, seed=2)
    largest = twins.max_clip_twin(x, signed)
    obvious = min(twins.mse_twin(x, k / 50 * largest, num_bits, signed) for k in range(1, 51))
    assert twins.best_sweep_mse(x, num_bits, signed, points=50) == pytest.approx(obvious, rel=1e-9)


@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
def test_surrogate_passes_gradcheck_and_is_mad(signed: bool) -> None:
    """The surrogate's numerical derivative is its analytical one, and that is gradient_twin's MAD factor."""
    x = torch.randn(64, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).mul(2).requires_grad_()
    clip = torch.tensor(1.1, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda t: twins.mad_surrogate(t, clip, signed), (x,))
    (grad,) = torch.autograd.grad(twins.mad_surrogate(x, clip, signed).sum(), x)
    np.testing.assert_allclose(grad.numpy(), twins.gradient_twin(x, clip, signed, "mad"), rtol=1e-12)
    assert 0.2 < float((x.detach().abs() > clip).double().mean()) < 0.8


def test_grid_ends_and_ties() -> None:
    """Two's complement: the positive end is one step short of the clip, the negative end is at it; ties go to even."""
    x = [-9.0, -8.0, -2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 7.5, 8.0, 9.0]
    assert twins.quantize_twin(x, 8.0, 4).tolist() == [-8, -8, -2, -2, 0, 0, 2, 2, 7, 7, 7]
    assert twins.quantize_twin(x, 16.0, 4, signed=False).tolist() == [0, 0, 0, 0, 0, 0, 2, 2, 8, 8, 9]
    assert twins.quantize_twin([17.0], 16.0, 4, signed=False).tolist() == [15]


def test_percentile_is_numpys_inverted_cdf() -> None:
    """Equal at sizes where NumPy's arithmetic is exact, and exact where it is not."""
    x = twins.samples("laplace", 3001, seed=5)
    for percentile in (1, 50, 90, 99.9, 99.99, 99.999, 100):
        expected = np.percentile(np.abs(x).astype(np.float64), percentile, method="inverted_cdf")
        assert twins.percentile_clip_twin(x, percentile) == expected
    assert twins.percentile_clip_twin(np.arange(1, 1001), 99.9) == 999
