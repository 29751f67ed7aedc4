"""What is the C++'s own: threads, memory that rows share, and how it tells that it has found nothing."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from octav_hf.functional.kernels import cpu
from tests import twins

Tensor = torch.Tensor


@pytest.fixture(autouse=True)
def path() -> None:
    """In place of the fixture that takes every path."""


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Two threads, where there are as many cores."""
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def gaussian(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def clips(rows: Tensor, num_bits: int = 4, signed: bool = True) -> Tensor:
    result = cpu.fixed_points(rows, num_bits, signed)
    assert result is not None
    return result


@pytest.mark.parametrize("shape", [(1, 1 << 20), (2, 1 << 18), (1, 50_001), (3, 50_001), (1000, 129), (7, 9)], ids=str)
@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
def test_threads_share_the_work_and_not_the_result(shape: tuple[int, int], signed: bool, two_threads: None) -> None:
    rows = gaussian(*shape)
    together = clips(rows, signed=signed)
    assert torch.equal(clips(rows, signed=signed), together)
    torch.set_num_threads(1)
    torch.testing.assert_close(clips(rows, signed=signed), together, rtol=1e-6, atol=0)
    expected = twins.octav_clip_twin(rows[-1], 4, signed)
    assert together[-1].item() == pytest.approx(expected, rel=1e-5)


def test_a_large_tensor_on_which_eq6_alternates(two_threads: None) -> None:
    """Most of it on few levels: the two clips about one of them are compared by their errors, by all threads."""
    x = gaussian(1, 700_001).mul(1.5).round()
    got = [clips(x, num_bits, signed).item() for num_bits in (2, 3, 4) for signed in (True, False)]
    expected = [twins.octav_clip_twin(x, num_bits, signed) for num_bits in (2, 3, 4) for signed in (True, False)]
    assert got == pytest.approx(expected, rel=2e-5)


def test_rows_do_not_see_what_others_left_behind() -> None:
    """One after another they use the same memory: long tails first, then rows with next to none."""
    rows = torch.cat([gaussian(5, 300).sinh().sinh(), gaussian(5, 300).clamp(-1, 1), torch.zeros(2, 300)])
    rows = torch.cat([rows, gaussian(4, 300) * 1e-30, torch.ones(1, 300)])
    together = clips(rows)
    assert torch.equal(together, torch.cat([clips(row[None]) for row in rows]))
    assert torch.equal(together, clips(rows.flip(0)).flip(0))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("size", [100, 200_000])
@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
def test_a_row_that_is_not_finite_has_no_clip(value: float, size: int, signed: bool) -> None:
    rows = gaussian(3, size)
    rows[1, size // 2] = value
    assert clips(rows, signed=signed).isnan().tolist() == [False, True, False]


def test_zeros_have_the_clip_zero_and_a_sum_that_overflows_none() -> None:
    rows = torch.stack([torch.zeros(40), torch.full((40,), 1e38), torch.full((40,), 1e36)])
    zero, overflowing, constant = clips(rows).tolist()
    assert zero == 0
    assert overflowing != overflowing
    assert constant == pytest.approx(1e36)


def test_a_view_with_negation_pending_is_negated() -> None:
    x = torch.complex(torch.zeros(4096), gaussian(4096)).conj().imag
    assert x.is_neg()
    expected = twins.octav_clip_twin(x.resolve_neg(), 4, False)
    assert clips(x[None], signed=False).item() == pytest.approx(expected, rel=1e-5)
