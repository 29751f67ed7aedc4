"""The C++ kernels against the reference operations, and their threads and shared buffers."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from octav_hf.functional import fake_quantize, max_clip, mse_clip, octav_clip, percentile_clip
from octav_hf.functional.kernels import compilation, cpu
from octav_hf.functional.kernels.operations import NotFinite
from octav_hf.functional.mse import lowest_error_of_table, mse_of_rows
from octav_hf.functional.octav import fixed_point_of_table, octav_of_rows
from octav_hf.functional.rows import has_negative
from octav_hf.functional.table import magnitude_table
from tests import twins

Tensor = torch.Tensor
SIGNED, UNSIGNED = torch.tensor(True), torch.tensor(False)


@pytest.fixture(params=["compiled", pytest.param("portable", marks=pytest.mark.slow)], autouse=True)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces the fixture that takes every path."""
    monkeypatch.setattr(cpu, "MIN_NUMEL", 1)
    if request.param == "portable":
        monkeypatch.setattr(cpu, "FLAGS", ("-mno-avx512f",))


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """``torch.set_num_threads``, until the end of a test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def gaussian(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def reference(operation: Callable[..., Tensor], *arguments: object) -> Tensor:
    """The result of an operation without kernels, also in the operations that it calls."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(compilation.SWITCH, "0")
        return operation(*arguments)


TENSORS: dict[str, Callable[[], Tensor]] = {
    "gaussian": lambda: gaussian(50_001),
    "heavy_tail": lambda: gaussian(40_000).mul(2).sinh(),
    "softmax": lambda: torch.softmax(4 * gaussian(100, 400), dim=-1).flatten(),
    "relu6": lambda: gaussian(40_000).mul(0.9).add(1).clamp(0, 2) * 0.37,
    "few_levels": lambda: gaussian(40_000).mul(3).round() / 7,
    "constant": lambda: torch.full((40_000,), -0.3),
    "zeros": lambda: torch.zeros(40_000),
    "one_value": lambda: torch.zeros(40_000).index_fill(0, torch.tensor([7]), -2.7),
    "negative": lambda: -gaussian(40_000).abs(),
    "outlier": lambda: torch.cat([gaussian(40_000), torch.tensor([1e30])]),
    "huge": lambda: gaussian(40_000).clamp(-3, 3) * 1.1e38,
    "tiny": lambda: gaussian(40_000) * 1e-37,
    "subnormal": lambda: gaussian(40_000) * 1e-39,
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [*TENSORS, "not_finite", "empty"])
def test_the_table_is_the_references(name: str, dtype: torch.dtype) -> None:
    special = {"not_finite": torch.tensor([torch.inf, -torch.inf, 1.0]), "empty": torch.zeros(0)}
    x = (special[name] if name in special else TENSORS[name]()).to(dtype)
    table = magnitude_table(x)
    assert torch.equal(table, reference(magnitude_table, x))
    assert torch.equal(magnitude_table(x[: len(x) // 3]) + magnitude_table(x[len(x) // 3 :]), table)


@pytest.mark.parametrize("num_bits", [2, 4, 8])
@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
@pytest.mark.parametrize("name", TENSORS)
def test_clips_of_tables_and_rows_are_the_references(name: str, signed: bool, num_bits: int) -> None:
    x, sign = TENSORS[name](), torch.tensor(signed)
    table = magnitude_table(x)
    for operation in (fixed_point_of_table, lowest_error_of_table):
        expected = reference(operation, table, num_bits, sign)
        torch.testing.assert_close(operation(table, num_bits, sign), expected, rtol=1e-6, atol=0)
    rows = x[:40_000].view(-1, 400)[:30]
    arguments = (num_bits, sign, None, True)
    assert torch.equal(octav_of_rows(x[None], *arguments)[0], fixed_point_of_table(table, num_bits, sign))
    assert torch.equal(mse_of_rows(x[None], *arguments)[0], lowest_error_of_table(table, num_bits, sign))
    expected = reference(octav_of_rows, rows, *arguments)
    torch.testing.assert_close(octav_of_rows(rows, *arguments), expected, rtol=1e-5, atol=1.5e-45)
    if name in ("subnormal", "huge"):  # with steps or clips that float32 can hardly hold
        return
    # Two candidates may have nearly the same error.
    got, expected = mse_of_rows(rows, *arguments).tolist(), reference(mse_of_rows, rows, *arguments).tolist()
    values = rows if signed else rows.clamp(min=0)
    for row, clip, other in zip(values, got, expected, strict=True):
        errors = [twins.mse_twin(row, value, num_bits, signed) for value in (clip, other)]
        assert errors[0] == pytest.approx(errors[1], rel=0.01, abs=1e-12 * float(row.abs().max()) ** 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1 << 20), (2, 1 << 17), (3, 50_001), (1000, 129), (7, 9), (1, 5000)], ids=str)
@pytest.mark.parametrize("operation", [octav_of_rows, mse_of_rows], ids=["octav", "mse"])
def test_threads_share_the_work_and_not_the_result(
    operation: Callable[..., Tensor], shape: tuple[int, int], dtype: torch.dtype, threads: Callable[[int], None]
) -> None:
    rows = gaussian(*shape).to(dtype)
    results = []
    for number in (1, 2, 3):
        threads(number)
        results.append(operation(rows, 4, SIGNED, None, True))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    if operation is octav_of_rows:
        assert results[0][-1].item() == pytest.approx(twins.octav_clip_twin(rows[-1], 4), rel=1e-4)


def test_a_large_tensor_has_the_same_clip_in_any_order() -> None:
    x = gaussian(300, 400)
    shuffled = x.flatten()[torch.randperm(x.numel(), generator=torch.Generator().manual_seed(0))]
    for rule in (octav_clip, mse_clip):
        clip = rule(x, 4)
        for other in (x.T, x.T.contiguous(), x.flip(0), shuffled, -x if rule is octav_clip else x):
            assert torch.equal(rule(other, 4), clip)


def test_rows_do_not_see_what_others_left_behind() -> None:
    """Consecutive calls use the same memory: first rows with long tails, then rows almost without."""
    rows = torch.cat([gaussian(5, 300).sinh().sinh(), gaussian(5, 300).clamp(-1, 1), torch.zeros(2, 300)])
    rows = torch.cat([rows, gaussian(4, 300) * 1e-30, torch.ones(1, 300), gaussian(3, 300).clamp(-3, 3) * 1e38])
    for operation in (octav_of_rows, mse_of_rows):
        together = operation(rows, 4, SIGNED, None, True)
        alone = [operation(row[None], 4, SIGNED, None, True) for row in rows]
        assert torch.equal(together, torch.cat(alone))
        assert torch.equal(together, operation(rows.flip(0), 4, SIGNED, None, True).flip(0))
    long = torch.stack([gaussian(40_000).sinh().sinh(), gaussian(40_000) * 1e-30, torch.zeros(40_000)])
    together = octav_of_rows(long, 4, SIGNED, None, True)
    assert torch.equal(together, octav_of_rows(long.flip(0), 4, SIGNED, None, True).flip(0))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("size", [100, 200_000])
@pytest.mark.parametrize("signed", [SIGNED, UNSIGNED], ids=["signed", "unsigned"])
@pytest.mark.parametrize("operation", [octav_of_rows, mse_of_rows], ids=["octav", "mse"])
def test_a_row_that_is_not_finite_has_no_clip(
    operation: Callable[..., Tensor], value: float, size: int, signed: Tensor
) -> None:
    rows = gaussian(3, size)
    rows[1, size // 2] = value
    assert operation(rows, 4, signed, None, False).isnan().tolist() == [False, True, False]
    with pytest.raises(NotFinite):
        operation(rows, 4, signed, None, True)
    assert operation(rows, 4, signed, torch.tensor(True), True).tolist() == [0, 0, 0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("place", [0, 17, 4999, 9999])
def test_a_negative_value_is_found_wherever_it_is(dtype: torch.dtype, place: int) -> None:
    x = gaussian(10_000).abs().to(dtype)
    for value, expected in ((-0.0, False), (torch.nan, False), (torch.inf, False), (-1e-7, True), (-torch.inf, True)):
        x[place] = value
        assert has_negative(x).item() is expected
        assert has_negative(x.view(100, 100).T).item() is expected
    assert not has_negative(x[:0]).item()


def test_a_view_with_negation_pending_is_negated() -> None:
    x = torch.complex(torch.zeros(4096), gaussian(4096)).conj().imag
    assert x.is_neg()
    expected = twins.octav_clip_twin(x.resolve_neg(), 4, False)
    assert octav_clip(x, 4, signed=False).item() == pytest.approx(expected, rel=1e-5)


def test_a_small_tensor_does_not_load_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "MIN_NUMEL", 1 << 12)
    monkeypatch.setattr(cpu, "_libraries", {})
    assert octav_clip(gaussian(1000), 4) > 0
    assert not cpu._libraries
    small = mse_clip(gaussian(1000), 4)
    assert octav_clip(gaussian(5000), 4) > 0
    assert list(cpu._libraries) == [cpu.FLAGS]
    assert torch.equal(mse_clip(gaussian(1000), 4), small)  # whatever was computed in between


def test_what_has_no_kernel_does_not_load_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_libraries", {})
    x = gaussian(5000)
    for clip in (max_clip(x, 4), percentile_clip(x, 4), octav_clip(x, 4, max_iterations=10)):
        fake_quantize(x, clip, 4)
    assert not cpu._libraries
