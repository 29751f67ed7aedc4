"""Static clips from the values of several calls, against references that see all values at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from octav_hf.functional.table import magnitude_table
from octav_hf.nn import FakeQuantize, FrozenClips, HistogramObserver
from octav_hf.nn.sparse_table import SparseTable

from .. import twins

Tensor = torch.Tensor


def calls(*shape: int) -> list[Tensor]:
    """Tensors of several sizes and scales, whose own clips are far from the common clip."""
    generator = torch.Generator().manual_seed(0)
    return [scale * torch.randn(size, *shape, generator=generator) for size, scale in ((40, 1.0), (1, 8.0), (90, 0.3))]


def observed(tensors: list[Tensor], per_pass: int = 1, **settings: Any) -> FrozenClips | None:
    """The clips after these calls, with a number of calls per forward pass, and repeated passes if requested."""
    quantizer = FakeQuantize(4, **{"name": "layer input", **settings})
    quantizer.observer = observer = HistogramObserver(quantizer)
    for _ in range(2):
        for number, tensor in enumerate(tensors):
            quantizer(tensor, number % per_pass)
        if not observer.needs_another_pass():
            break
    return observer.frozen()


def check(clip: float, x: Tensor, signed: bool, rule: str) -> None:
    if rule == "max":
        assert clip == pytest.approx(twins.max_clip_twin(x, signed), rel=1e-7)
    elif rule == "percentile":  # to within a bin
        assert clip == pytest.approx(twins.percentile_clip_twin(x, 99.9, signed), rel=2**-7)
    elif rule == "octav":
        assert clip == pytest.approx(twins.octav_clip_twin(x, 4, signed), rel=2e-4)
    else:
        assert twins.mse_twin(x, clip, 4, signed) <= 1.02 * twins.best_sweep_mse(x, 4, signed)


RULES = ["octav", "mse", "max", "percentile"]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("signed", [True, False, None])
def test_it_is_the_clip_of_all_values_whatever_their_order(rule: str, signed: bool | None) -> None:
    tensors = calls(30)
    if signed is None:
        tensors = [tensor.abs() for tensor in tensors]
    frozen = observed(tensors, clip=rule, signed=signed)
    assert (frozen.signed, frozen.offset, frozen.clips.shape) == (signed is True, None, (1,))
    check(float(frozen.clips), torch.cat(tensors), signed is True, rule)
    whole = torch.cat(tensors)
    parts = [whole[100:], whole[:3], torch.empty(0, 30), whole[3:100]]
    for others in ([whole], tensors[::-1], parts):
        assert torch.equal(observed(others, clip=rule, signed=signed).clips, frozen.clips)


def test_one_negative_value_decides_for_the_signed_grid() -> None:
    tensors = [tensor.abs() for tensor in calls(30)]
    tensors.insert(1, -tensors[0][:1])
    frozen = observed(tensors, signed=None)
    assert frozen.signed
    check(float(frozen.clips), torch.cat(tensors), True, "octav")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_of_other_dtypes(dtype: torch.dtype) -> None:
    tensors = [tensor.to(dtype) for tensor in calls(30)]
    frozen = observed(tensors)
    assert frozen.clips.dtype == torch.promote_types(dtype, torch.float32)
    check(float(frozen.clips), torch.cat(tensors), True, "octav")


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dims", [(-1,), (-2, -1)], ids=["channels", "heads"])
def test_each_part_has_the_clip_of_all_its_values(rule: str, dims: tuple[int, ...]) -> None:
    """Over all calls and samples; ``[batch, heads, channels, tokens]``."""
    tensors = [tensor * torch.arange(1, 4)[:, None, None] for tensor in calls(3, 5, 30)]
    frozen = observed(tensors, clip=rule, dim=dims, frozen_dim=dims)
    whole = torch.cat(tensors).movedim(0, -1)
    parts = whole.flatten(2) if dims == (-1,) else whole.flatten(1)
    assert frozen.clips.shape == (1, *parts.shape[:-1])
    for clip, part in zip(frozen.clips.flatten(), parts.reshape(-1, parts.shape[-1]), strict=True):
        check(float(clip), part, True, rule)
    again = observed([torch.cat(tensors[::-1])], clip=rule, dim=dims, frozen_dim=dims)
    assert torch.equal(again.clips, frozen.clips)


def test_parts_without_a_batch() -> None:
    x = calls(30)[0]
    frozen = observed([x, 3 * x], dim=(-1,), frozen_dim=(-1,))
    assert frozen.clips.shape == (1, 40)
    for clip, row in zip(frozen.clips[0], x, strict=True):
        check(float(clip), torch.cat([row, 3 * row]), True, "octav")


@pytest.mark.parametrize("rule", RULES)
def test_an_asymmetric_grid_begins_at_the_lowest_value_of_all(rule: str) -> None:
    tensors = [torch.nn.functional.gelu(tensor) for tensor in calls(30)]
    frozen = observed(tensors, clip=rule, signed=None, asymmetric=True)
    whole = torch.cat(tensors)
    assert (frozen.signed, frozen.offset) == (False, whole.min())
    check(float(frozen.clips), whole - whole.min(), False, rule)
    again = observed([whole.flip(0)], clip=rule, signed=None, asymmetric=True)
    assert torch.equal(again.clips, frozen.clips)


def test_tails_on_both_sides_stay_on_the_signed_grid_and_no_negative_value_on_the_unsigned() -> None:
    x = torch.cat([torch.randn(2000, generator=torch.Generator().manual_seed(0)) * 0.1, torch.tensor([-9.0, 9.0])])
    frozen = observed([x[:1000], x[1000:]], signed=None, asymmetric=True)
    assert (frozen.signed, frozen.offset) == (True, None)
    check(float(frozen.clips), x, True, "octav")
    frozen = observed([x.abs()], signed=None, asymmetric=True)
    assert (frozen.signed, frozen.offset) == (False, None)
    check(float(frozen.clips), x.abs(), False, "octav")


def test_each_multiplication_has_its_own_clip_on_one_grid() -> None:
    first, second, third = calls(30)
    frozen = observed([first.abs(), second, third.abs(), first], per_pass=2, signed=None)
    assert (frozen.signed, frozen.clips.shape) == (True, (2,))
    check(float(frozen.clips[0]), torch.cat([first, third]), True, "octav")
    check(float(frozen.clips[1]), torch.cat([second, first]), True, "octav")


def test_nothing_is_found_without_values() -> None:
    empty = torch.empty(0, 3)
    assert observed([empty, empty], signed=None, asymmetric=True) is None
    assert observed([torch.ones(2), empty], per_pass=2) is None
    assert HistogramObserver(FakeQuantize(4)).frozen() is None


def test_parts_that_differ_between_calls_are_an_error() -> None:
    x = torch.ones(2, 4, 3)
    message = r"^layer value: clips of shape \(3,\) after clips of shape \(4,\); they cannot be frozen together"
    with pytest.raises(ValueError, match=message):
        observed([x, x[:, :3]], name="layer value", dim=(-1,), frozen_dim=(-1,))


def test_a_rule_that_needs_the_values_is_refused() -> None:
    message = "layer input: the clip 'mse_sweep' cannot be computed from a histogram, only 'max', 'mse', 'octav'"
    with pytest.raises(ValueError, match=message):
        observed([], clip="mse_sweep")


def test_a_sparse_table_adds_up_and_keeps_filled_bins_alone() -> None:
    tensors = [*calls(30), torch.tensor([0.0, -0.0, 1e-40, torch.inf])]
    table = SparseTable()
    assert not table.dense().any()
    for tensor in tensors:
        table.add(tensor)
    whole = magnitude_table(torch.cat([tensor.flatten() for tensor in tensors]))
    assert torch.equal(table.dense(), whole)
    assert sum(tensor.nbytes for tensor in vars(table).values()) == 20 * int((whole[0] > 0).sum())
