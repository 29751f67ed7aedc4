"""The measurements of clips, against independent float64 computations."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from clip_measurements.measurements import Eq6, ErrorsOfClips, convergence, measure, second_minima, sequences, starts
from clip_measurements.tensors import SeenTensor

from octav_hf.functional import octav_clip


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def quantize(x: np.ndarray, clip: float, bits: int, signed: bool) -> np.ndarray:
    """Eq. 2 and 3 with footnote 2's range, in NumPy."""
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    step = clip / 2 ** (bits - 1 if signed else bits)
    return step * np.clip(np.round(x / step), low, high)


def plain_eq6(magnitudes: np.ndarray, noise: float, start: float, updates: int) -> list[float]:
    """Eq. 6, term by term."""
    clips = [start]
    for _ in range(updates):
        s = clips[-1]
        above = magnitudes > s
        clips.append(magnitudes[above].sum() / (noise * ((magnitudes > 0) & ~above).sum() + above.sum()))
    return clips


def with_outliers() -> torch.Tensor:
    """Gaussian values, and two 60 standard deviations away: Appendix G."""
    return torch.cat([normal(10_000), torch.tensor([60.0, -60.0])])


def tensor(values: torch.Tensor, signed: bool = True, dim: Any = None) -> SeenTensor:
    return SeenTensor("layer.0.x", "input" if dim is None else "weight", values, signed, dim)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_errors_from_prefix_sums(bits: int, signed: bool) -> None:
    x = torch.cat([normal(500), torch.tensor([0.0, 1.0, -1.0, 0.5, 30.0])])
    clips = torch.tensor([0.3, 1.0, 2.5, 30.0], dtype=torch.float64)
    values = x.double().numpy()
    expected = [((values - quantize(values, clip, bits, signed)) ** 2).mean() for clip in clips.tolist()]
    assert ErrorsOfClips(x, bits, signed)(clips).tolist() == pytest.approx(expected, rel=1e-9)


def test_a_clip_of_zero_leaves_every_value_as_its_error() -> None:
    x = normal(100)
    error = ErrorsOfClips(x, 4, True)(torch.zeros(1, dtype=torch.float64))
    assert error.item() == pytest.approx(x.double().square().mean().item())


@pytest.mark.parametrize(("bits", "signed"), [(4, True), (8, True), (4, False)])
def test_eq_6_from_five_starts_on_a_gaussian(bits: int, signed: bool) -> None:
    rows = normal(2, 3000)
    noise = 4.0**-bits / (3 if signed else 12)
    recursion = Eq6(rows, bits, signed)
    begin = starts(rows, signed)
    values = rows.double().numpy()
    peak = np.abs(values).max(axis=1) if signed else values.max(axis=1)
    assert begin["3σ"].tolist() == pytest.approx(3 * values.std(axis=1))
    assert begin["max"].tolist() == peak.tolist()
    for start in begin.values():
        sequence = recursion.sequence(start, 25)
        for row in range(2):
            magnitudes = np.abs(values[row]) if signed else np.maximum(values[row], 0)
            expected = plain_eq6(magnitudes, noise, start[row].item(), 25)
            assert sequence[:, row].tolist() == pytest.approx(expected, rel=1e-9)
        assert sequence[-1].tolist() == pytest.approx(octav_clip(rows, bits, signed=signed, dim=1)[:, 0].tolist(), 1e-5)


def test_eq_6_from_the_ends() -> None:
    """0 is followed by the mean of the nonzero magnitudes; max, with no magnitude above, by 0."""
    rows = torch.tensor([[0.0, 0.0, 1.0, -2.0, 6.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    recursion = Eq6(rows, 4, True)
    assert recursion.sequence(torch.zeros(2), 1)[1].tolist() == [3, 0]
    assert recursion.sequence(torch.tensor([6.0, 0.0]), 2)[:, 0].tolist() == [6, 0, 3]


def test_convergence_counts_updates_until_the_clip_stays_near() -> None:
    rows = normal(3, 2000)
    record, fixed = convergence(rows, 4, True)
    assert record["disagree"] == record["alternating"] == 0
    assert record["alternation"] == 0
    for name, start in starts(rows, True).items():
        expected: Counter[str] = Counter()
        for row, first in zip(rows.double().abs().numpy(), start.tolist(), strict=True):
            clips = np.array(plain_eq6(row, 4.0**-4 / 3, first, 100))
            far = np.abs(clips - clips[-1]) > 1e-4 * clips[-1]
            expected[str(np.flatnonzero(far)[-1] + 1 if far.any() else 0)] += 1
        assert record["updates"][name] == expected
        assert record["never"][name] == 0
    assert fixed.tolist() == pytest.approx(octav_clip(rows, 4, dim=1)[:, 0].tolist(), rel=1e-6)


def test_rows_in_which_the_recursion_alternates() -> None:
    """From above 1 only 1.1 is clipped, which gives a clip below 1; from there all are, which gives the mean."""
    low, high = 1.1 / (6 * 4.0**-2 / 3 + 1), 7.1 / 7
    rows = torch.stack([torch.tensor([1.0] * 6 + [1.1], dtype=torch.float64), normal(7).double()])
    record, fixed = convergence(rows, 2, True)
    assert record["alternating"] == 1
    assert record["alternation"] == pytest.approx((high - low) / high)
    assert fixed.isnan().tolist() == [True, False]
    assert all(sum(counts.values()) == 1 for counts in record["updates"].values())


@pytest.mark.parametrize(
    ("curve", "expected"),
    [
        ([5, 1, 3, 2.9, 4], 3),
        ([5, 1, 3, 2.98, 4], -1),  # the ridge is 0.7 % above it
        ([4, 2.9, 3, 1, 5], 1),
        ([5, 1, 3, 2], 3),  # at the end
        ([5, 2, 3, 1, 3, 2.5, 2.6, 1.5, 4], 7),  # the lower of three
        ([5, 4, 3, 2, 3, 4], -1),
        ([5, 1, 4, 3.99, 3.97, 3.98, 3], 6),  # a small hollow on the way down to it
        ([2, 2, 2], -1),
    ],
)
def test_second_minimum_of_a_curve(curve: list[float], expected: int) -> None:
    other = [1.0, *([3.0] * (len(curve) - 2)), 2.0]  # each row is looked at by itself
    assert second_minima(torch.tensor([curve, other]))[0].item() == expected


def test_second_minimum_of_a_tensor_with_outliers() -> None:
    """Found at the clip that a fine grid of clips gives; none for a Gaussian."""
    values = with_outliers().double().numpy()
    clips = 60 * np.arange(1, 1001) / 1000
    errors = np.array([((values - quantize(values, clip, 4, True)) ** 2).mean() for clip in clips])
    near = errors[:500].argmin()
    far = 500 + errors[500:].argmin()
    assert errors[near:far].max() > 1.01 * max(errors[near], errors[far])
    best, second = sorted((near, far), key=errors.__getitem__)
    record, detail = measure(tensor(with_outliers()), 4, 1)
    assert record["second_minima"] == record["second_minima_far"] == 1
    assert record["second_minimum"]["clip"] == pytest.approx(clips[second])
    assert record["second_minimum"]["mse"] == pytest.approx(errors[second])
    assert record["clips"]["best"] == pytest.approx(clips[best])
    assert detail["curve"] == pytest.approx(errors, rel=1e-6)
    unimodal, _ = measure(tensor(normal(10_000)), 4, 1)
    assert (unimodal["second_minima"], unimodal["second_minima_far"], unimodal["second_minimum"]) == (0, 0, None)


@pytest.mark.parametrize("signed", [True, False])
def test_a_tensor_of_one_clip(signed: bool) -> None:
    x = normal(4, 500) if signed else normal(4, 500).abs()
    record, _ = measure(tensor(x, signed), 4, 1)
    values = x.double().numpy()

    def error(clip: float) -> float:
        return float(((values - quantize(values, clip, 4, signed)) ** 2).mean())

    peak = np.abs(values).max()
    for points, rule in ((100, "sweep"), (1000, "best")):
        candidates = peak * np.arange(1, points + 1) / points
        best = min(candidates, key=error)
        assert record["clips"][rule] == pytest.approx(best, rel=1e-5)
        assert record["mse"][rule] == pytest.approx(error(best), rel=1e-5)
    for rule in ("octav", "max"):
        assert record["mse"][rule] == pytest.approx(error(record["clips"][rule]), rel=1e-5)
    assert record["clips"]["max"] == pytest.approx(peak)
    assert record["octav_to_fixed_point"] < 1e-5
    assert all(seconds > 0 for seconds in record["seconds"].values())
    assert (record["rows"], record["octav_rows"]) == (None, None)


def test_a_weight_has_a_clip_for_each_row() -> None:
    x = normal(3, 1000) * torch.tensor([[1.0], [10.0], [0.0]])
    x[1, 0] = 1000  # whose best clip reaches out to it, which OCTAV's does not
    record, detail = measure(tensor(x, dim=(1,)), 4, 1)
    rows = [measure(tensor(row), 4, 1)[0] for row in x]
    for part in ("clips", "mse"):
        for rule in ("octav", "sweep", "max", "best"):
            mean = np.mean([row[part][rule] for row in rows])
            assert record[part][rule] == pytest.approx(mean, rel=1e-4), (part, rule)
    assert record["octav_rows"]["max"] == pytest.approx(rows[1]["clips"]["octav"], rel=1e-6)
    assert record["octav_rows"]["min"] == 0
    assert detail["row"] == 1
    assert detail["clips"]["sweep"] == pytest.approx(rows[1]["clips"]["sweep"])
    assert record["sweep_far_above"] == sum(row["sweep_far_above"] for row in rows) == 1
    assert sequences(tensor(x, dim=(1,)), 4)["row"] == 1


def test_values_on_a_grid_have_no_error_and_no_ratio() -> None:
    levels = torch.arange(-8, 8) / 8
    record, _ = measure(tensor(levels.repeat(10)), 4, 1)
    assert record["mse"]["max"] == record["mse"]["sweep"] == record["mse"]["best"] == 0
    assert record["mse"]["octav"] > 0
