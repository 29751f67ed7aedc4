"""The Triton kernels, interpreted where there is no GPU, and compiled for several."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from octav_hf.functional import mse_clip, octav_clip
from octav_hf.functional.error import rows_errors
from octav_hf.functional.kernels import compilation, cuda, operations
from octav_hf.functional.mse import lowest_error_of_table, mse_of_rows
from octav_hf.functional.octav import fixed_point_of_table, octav_of_rows
from octav_hf.functional.rows import has_negative
from tests import twins

triton = pytest.importorskip("triton", reason="pip install triton")

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")  # NumPy, by which Triton interprets

Tensor = torch.Tensor
ROOT = Path(__file__).parents[3]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZE = 40_000  # of a long row
PACKED = cuda._PACKED
NAN, INF = float("nan"), float("inf")


@pytest.fixture(autouse=True)
def path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces the fixture that takes every path: several small tables and blocks."""
    monkeypatch.delenv(compilation.SWITCH, raising=False)
    monkeypatch.setattr(cuda, "DEVICE_TYPES", (DEVICE,))
    monkeypatch.setattr(cuda, "_BLOCK", 1 << 13)
    monkeypatch.setattr(cuda, "_PACKED", 1 << 14)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def with_value(value: float, size: int) -> Tensor:
    x = random(size)
    x[size // 3] = value
    return x


AWKWARD: dict[str, Callable[[int], Tensor]] = {
    "gaussian": random,
    "bfloat16": lambda n: random(n).to(torch.bfloat16),
    "float16": lambda n: random(n).to(torch.float16),
    "log_normal": lambda n: (3 * random(n)).exp(),
    "softmax": lambda n: torch.softmax(4 * random(n // 40, 40), dim=-1).flatten(),
    "relu6": lambda n: (4 * random(n)).clamp(0, 6),
    "scaled_relu6": lambda n: (2 * random(n) + 3).clamp(0, 6) * 0.37,
    "integers": lambda n: (3 * random(n)).round(),
    "two_values": lambda n: torch.where(torch.arange(n) % 10 == 0, 3.0, 1.0),
    "constant": lambda n: torch.full((n,), -0.3),
    "one_value": lambda n: 2.7 * (torch.arange(n) == n // 2),
    "zeros": torch.zeros,
    "minus_zeros": lambda n: -torch.zeros(n),
    "negative": lambda n: -random(n).abs(),
    "subnormal": lambda n: random(n) * 1e-41,
    "tiny": lambda n: random(n) * 1e-36,
    "sum_overflows": lambda n: random(n).clamp(-3, 3) * 1e37,
    "float32_max": lambda n: with_value(torch.finfo(torch.float32).max, n),
    "outlier_1e30": lambda n: with_value(1e30, n),
    "outlier_-1e30": lambda n: with_value(-1e30, n),
    "nan": lambda n: with_value(NAN, n),
    "inf": lambda n: with_value(INF, n),
    "-inf": lambda n: with_value(-INF, n),
}
QUICK = ("gaussian", "bfloat16", "relu6", "nan")
every_kind = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in AWKWARD]
)
bits = pytest.mark.parametrize(
    "num_bits", [pytest.param(2, marks=pytest.mark.slow), 4, pytest.param(8, marks=pytest.mark.slow)]
)
both_signs = pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])


def table_twin(x: Tensor) -> np.ndarray:
    bits = x.to(torch.float32).numpy().view(np.uint32).astype(np.int64)
    table = [np.bincount(bits >> 16, weights, 1 << 16) for weights in (np.ones(len(bits)), bits & 0xFFFF)]
    return np.stack(table).astype(np.int64).reshape(2, 2, 1 << 15)


def flag(value: bool) -> Tensor:
    return torch.tensor(value, device=DEVICE)


def assert_close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got.cpu(), expected.cpu(), rtol=1e-6, atol=1.5e-45, equal_nan=True)


@every_kind
def test_a_table_is_the_count_of_every_value(name: str) -> None:
    x = AWKWARD[name](SIZE)
    np.testing.assert_array_equal(cuda.magnitude_table(x.to(DEVICE)).cpu().numpy(), table_twin(x))


@pytest.mark.slow
def test_many_equal_values_do_not_overflow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A count of 2^24 would overflow one packed table."""
    monkeypatch.setattr(cuda, "_BLOCK", 1 << 20)
    monkeypatch.setattr(cuda, "_PACKED", PACKED)
    x = torch.full((1 << 24,), 0x3FFFFFFF, dtype=torch.int32, device=DEVICE).view(torch.float32)
    table = cuda.magnitude_table(x)
    assert table.sum(dim=(1, 2)).tolist() == [1 << 24, 65535 << 24]
    assert table[:, 0, 0x3FFF].tolist() == [1 << 24, 65535 << 24]


@every_kind
@both_signs
@bits
def test_clips_of_tables(name: str, signed: bool, num_bits: int) -> None:
    x = AWKWARD[name](SIZE)
    table = torch.from_numpy(table_twin(x)).to(DEVICE)
    octav = cuda.fixed_point_of_table(table, num_bits, flag(signed))
    mse = cuda.lowest_error_of_table(table, num_bits, flag(signed))
    assert_close(octav, fixed_point_of_table.reference(table, num_bits, flag(signed)))
    assert_close(mse, lowest_error_of_table.reference(table, num_bits, flag(signed)))
    if not x.isfinite().all():
        assert octav.isnan()
        assert mse.isnan()
    elif twins.octav_magnitudes(x, signed).size == 0:
        assert octav == mse == 0
    elif name != "subnormal":  # where the bins are as coarse as the values
        assert octav.item() == pytest.approx(twins.octav_root_twin(x, num_bits, signed), rel=2e-4)


@pytest.mark.slow
@every_kind
@both_signs
def test_what_sums_leave_out_changes_no_clip(name: str, signed: bool) -> None:
    x = AWKWARD[name](SIZE).to(DEVICE)
    table = cuda.magnitude_table(x)
    for of_rows, of_table in (
        (cuda.octav_of_rows, cuda.fixed_point_of_table),
        (cuda.mse_of_rows, cuda.lowest_error_of_table),
    ):
        got = of_rows(x[None], 4, flag(signed), None, False)
        torch.testing.assert_close(got[0], of_table(table, 4, flag(signed)), rtol=0, atol=0, equal_nan=True)


@both_signs
@pytest.mark.parametrize("name", ["gaussian", "softmax", "log_normal"])
def test_a_wrong_guess_changes_no_clip(name: str, signed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sample has the largest or the smallest magnitudes only."""
    x = AWKWARD[name](SIZE).to(DEVICE)
    expected = cuda.fixed_point_of_table(cuda.magnitude_table(x), 4, flag(signed))
    monkeypatch.setattr(cuda, "_SAMPLE", 32)
    x = x[x.abs().argsort()]
    for lowest_first in (x, x.flip(0)):
        sampled = torch.arange(32, device=DEVICE) * (SIZE // 32)
        sampled += torch.arange(32, device=DEVICE) * 40503 % (SIZE // 32)
        mixed = torch.empty_like(x)
        mixed[sampled] = lowest_first[:32]
        rest = torch.ones(SIZE, dtype=torch.bool, device=DEVICE)
        rest[sampled] = False
        mixed[rest] = lowest_first[32:]
        assert cuda.octav_of_rows(mixed[None], 4, flag(signed), None, False) == expected


@pytest.mark.parametrize("name", ["gaussian", "softmax"])
def test_most_values_are_not_counted(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = []
    monkeypatch.setattr(torch, "empty", torch.zeros)  # bins that are not counted stay unset
    monkeypatch.setattr(cuda, "_clips_of_tables", lambda tables, *_: counted.append(tables[:, 0].sum()) or tables)
    x, signed = AWKWARD[name](SIZE).to(DEVICE), flag(name == "gaussian")
    cuda.octav_of_rows(x[None], 4, signed, None, False)
    assert 0 < counted[0] < 0.1 * SIZE


@both_signs
@pytest.mark.parametrize("name", ["gaussian", "softmax", "log_normal"])
def test_the_error_is_nearly_the_lowest(name: str, signed: bool) -> None:
    x = AWKWARD[name](SIZE)
    clip = cuda.lowest_error_of_table(torch.from_numpy(table_twin(x)).to(DEVICE), 4, flag(signed)).item()
    assert twins.mse_twin(x, clip, 4, signed) <= 1.005 * twins.best_sweep_mse(x, 4, signed)


@pytest.mark.parametrize(
    ("dtype", "num_bits"),
    [
        (torch.float32, 4),
        *(pytest.param(torch.float32, bits, marks=pytest.mark.slow) for bits in (2, 8)),
        *(pytest.param(dtype, 4, marks=pytest.mark.slow) for dtype in (torch.bfloat16, torch.float16)),
    ],
)
@both_signs
def test_clips_of_short_rows(dtype: torch.dtype, num_bits: int, signed: bool) -> None:
    """Values of every kind at once, one row each."""
    # Triton's interpreter takes subnormal bfloat16 values for zeros.
    names = [name for name in AWKWARD if dtype == torch.float32 or name not in ("tiny", "subnormal")]
    rows = torch.stack([AWKWARD[name](400)[:399].to(dtype) for name in names])
    got = cuda.octav_of_rows(rows.to(DEVICE), num_bits, flag(signed), None, False).cpu()
    assert_close(got, octav_of_rows.reference(rows, num_bits, torch.tensor(signed), None, False))
    for row, clip in zip(rows, got.tolist(), strict=True):
        if not row.isfinite().all():
            assert np.isnan(clip)
        elif twins.octav_magnitudes(row, signed).size == 0:
            assert clip == 0
        else:
            assert clip == pytest.approx(twins.octav_root_twin(row, num_bits, signed), rel=1e-6, abs=1.5e-45)
    # Squares of subnormal steps are another matter.
    rows = rows[[name != "subnormal" for name in names]]
    got = cuda.mse_of_rows(rows.to(DEVICE), num_bits, flag(signed), None, False).cpu()
    expected = mse_of_rows.reference(rows, num_bits, torch.tensor(signed), None, False)
    assert torch.equal(got.isnan(), expected.isnan())
    rows, both = rows[~got.isnan()], torch.stack([got, expected])[:, ~got.isnan()]
    if not signed:
        rows = rows.clamp(min=0)
    errors = rows_errors(rows, both, num_bits, signed)
    # Of two candidates with errors that rounding can swap, either will do. Errors are in units of the peak, squared.
    same = ((both[0] - both[1]).abs() <= 1e-6 * both[1]) | ((errors[0] - errors[1]).abs() <= 2e-6 * errors[1] + 1e-12)
    assert same.all(), both[:, ~same]


@pytest.mark.parametrize("length", [1, 31, 33, 1000, pytest.param((1 << 15) - 1, marks=pytest.mark.slow)])
def test_rows_of_every_length(length: int) -> None:
    rows = random(2, length).sinh()
    got = cuda.octav_of_rows(rows.to(DEVICE), 4, flag(True), None, False)
    assert got.tolist() == pytest.approx([twins.octav_root_twin(row, 4) for row in rows], rel=1e-6)


@pytest.mark.slow
def test_long_rows_have_tables_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_TABLES", 2)
    rows = random(3, SIZE) * torch.tensor([[1.0], [0.0], [30.0]])
    rows[2] = rows[2].abs()
    for of_rows, of_table in (
        (cuda.octav_of_rows, cuda.fixed_point_of_table),
        (cuda.mse_of_rows, cuda.lowest_error_of_table),
    ):
        got = of_rows(rows.to(DEVICE), 4, flag(True), None, False)
        tables = [torch.from_numpy(table_twin(row)).to(DEVICE) for row in rows]
        assert torch.equal(got, torch.stack([of_table(table, 4, flag(True)) for table in tables]))


@pytest.mark.slow
@pytest.mark.parametrize("clips", [cuda.octav_of_rows, cuda.mse_of_rows])
@pytest.mark.parametrize("length", [100, SIZE])
def test_what_is_skipped_is_not_read(clips: Callable[..., Tensor], length: int) -> None:
    rows = random(1, length).to(DEVICE)
    taken = clips(rows, 4, flag(True), flag(False), False)
    assert torch.equal(taken, clips(rows, 4, flag(True), None, False))
    assert clips(rows * NAN, 4, flag(True), flag(True), False).tolist() == [0.0]


def test_nothing_has_the_clip_zero() -> None:
    rows = torch.zeros(2, 0, dtype=torch.float32, device=DEVICE)
    assert cuda.octav_of_rows(rows, 4, flag(True), None, False).tolist() == [0.0, 0.0]
    assert cuda.mse_of_rows(rows, 4, flag(True), None, False).tolist() == [0.0, 0.0]
    assert not cuda.magnitude_table(rows).any()


def test_operations_use_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels run where they exist; other operations and tensors use the reference functions."""
    monkeypatch.setitem(operations._kernels, DEVICE, cuda)
    used = []
    for name in ("octav_of_rows", "mse_of_rows"):
        kernel = getattr(cuda, name)
        monkeypatch.setattr(cuda, name, lambda *rows, name=name, kernel=kernel: used.append(name) or kernel(*rows))
    x = random(3, 100).to(DEVICE)
    for rule in (octav_clip, mse_clip):
        assert_close(rule(x, 4, dim=1), rule(x.double(), 4, dim=1).float())
    assert used == ["octav_of_rows", "mse_of_rows"]
    assert has_negative(x)
    assert octav_clip(x, 4, dim=1, max_iterations=10).shape == (3, 1)


def test_what_is_supported(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cuda.is_supported(torch.zeros(3, device=DEVICE))
    assert cuda.is_supported(torch.zeros(2, 2, 1 << 15, dtype=torch.int64, device=DEVICE))
    assert not cuda.is_supported(torch.zeros(3, dtype=torch.float64, device=DEVICE))
    assert not cuda.is_supported(torch.zeros(3, device="meta"))
    monkeypatch.setenv(compilation.SWITCH, "0")
    assert not cuda.is_supported(torch.zeros(3, device=DEVICE))


def test_kernels_that_cannot_be_launched_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launching fails, as without a C compiler, which Triton needs."""
    from octav_hf.functional.kernels import triton_kernels

    monkeypatch.setattr(triton_kernels, "unpack", None)
    monkeypatch.setattr(compilation, "_failed", False)
    cuda._triton_kernels.cache_clear()
    with pytest.warns(UserWarning, match="without compiled kernels"):
        assert not cuda.is_supported(torch.zeros(3, device=DEVICE))
    cuda._triton_kernels.cache_clear()


@pytest.mark.slow
def test_no_kernel_spills(tmp_path: Path) -> None:
    """Compiles for three generations of GPUs without one; the record in the repository matches."""
    output = tmp_path / "registers.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = ROOT / "benchmarks" / "triton_registers.py"
    subprocess.run([sys.executable, str(script), "--output", str(output)], check=True, env=environment, cwd=ROOT)
    kernels = json.loads(output.read_text())["kernels"]
    record = json.loads((ROOT / "benchmarks" / "results" / "triton_registers.json").read_text())["kernels"]
    assert [row["kernel"] for row in kernels] == [row["kernel"] for row in record]
    assert {name for row in record for name in row} == {"kernel", "warps", "sm_80", "sm_90", "sm_100"}
    for row in kernels:
        for name in ("sm_80", "sm_90", "sm_100"):
            assert row[name]["spilled_bytes"] == 0, row
            assert row[name]["registers"] * 32 * row["warps"] <= 65536, row
