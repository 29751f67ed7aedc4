"""A weight's clips are computed when it changes, however it is changed, and only then."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch

from octav_hf.functional import CLIP_RULES, octav_clip
from octav_hf.nn import WeightFakeQuantize

Tensor = torch.Tensor


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """The weights that octav was called for."""
    seen: list[Tensor] = []

    def counted(x: Tensor, *arguments: object, **options: object) -> Tensor:
        seen.append(x)
        return octav_clip(x, *arguments, **options)

    monkeypatch.setitem(CLIP_RULES, "octav", counted)
    return seen


@pytest.fixture
def weight() -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.randn(6, 40, generator=torch.Generator().manual_seed(0)))


def swap_rows(weight: Tensor) -> None:
    weight.data[[0, 1]] = weight.data[[1, 0]]


def swap_elements(weight: Tensor) -> None:
    weight.data[:, [0, 1]] = weight.data[:, [1, 0]]


CHANGES: dict[str, Callable[[Tensor], None]] = {
    "in_place": lambda w: w.data.add_(0.1),  # as PEFT merges an adapter; the version counter does not see it
    "one_element": lambda w: w.data[3, 4:5].mul_(1.01),
    "swapped_rows": swap_rows,
    "swapped_elements": swap_elements,
    "negated": lambda w: w.data.neg_(),
    "new_data": lambda w: setattr(w, "data", w.data * 2),
}


def test_an_unchanged_weight_is_computed_once(weight: Tensor, calls: list[Tensor]) -> None:
    quantizer = WeightFakeQuantize(4, dim=1)
    first = quantizer(weight)
    for _ in range(3):
        y = quantizer(weight)
        assert torch.equal(y, first)
        y.sum().backward()  # gradient accumulation: each pass has its own graph
    with torch.inference_mode():
        assert torch.equal(quantizer(weight), first)
    assert torch.equal(quantizer(weight.detach().clone()), first)
    assert len(calls) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_weight_is_computed_again(
    weight: Tensor, calls: list[Tensor], change: str, dtype: torch.dtype
) -> None:
    weight = weight.to(dtype).detach()
    quantizer = WeightFakeQuantize(4, dim=1)
    quantizer(weight)
    CHANGES[change](weight)
    assert torch.equal(quantizer.compute_clip(weight), octav_clip(weight, 4, dim=1))
    assert len(calls) == 2


@pytest.mark.parametrize("change", CHANGES)
def test_autocast_hides_no_change(weight: Tensor, calls: list[Tensor], change: str) -> None:
    """In its precision the product with the random vector would often stay the same."""
    weight = weight.detach()
    quantizer = WeightFakeQuantize(4, dim=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        quantizer(weight)
        CHANGES[change](weight)
        quantizer(weight)
        weight.data[2] *= 1.0001
        assert torch.equal(quantizer.compute_clip(weight), octav_clip(weight, 4, dim=1))
    assert torch.equal(quantizer.compute_clip(weight), octav_clip(weight, 4, dim=1))
    assert len(calls) == 3, "once for each value of the weight, within autocast or not"


@pytest.mark.parametrize("dim", [(1, 2, 3), None], ids=["per row", "per tensor"])
@pytest.mark.parametrize("place", [(0, 0, 0, 0), (2, 1, 0, 1), (5, 4, 3, 1)], ids=str)
def test_a_changed_kernel_is_computed_again(
    weight: Tensor, calls: list[Tensor], place: tuple[int, ...], dim: tuple[int, ...] | None
) -> None:
    kernel = weight.detach().view(6, 5, 4, 2)
    quantizer = WeightFakeQuantize(4, dim=dim)
    quantizer(kernel)
    quantizer(kernel)
    assert len(calls) == 1
    kernel[place] += 0.5
    assert torch.equal(quantizer.compute_clip(kernel), octav_clip(kernel, 4, dim=dim))
    assert len(calls) == 2


def test_an_optimizer_step_is_a_change(weight: torch.nn.Parameter, calls: list[Tensor]) -> None:
    quantizer = WeightFakeQuantize(4, dim=1)
    optimizer = torch.optim.AdamW([weight], lr=1e-6)
    for _ in range(3):
        quantizer(weight).square().sum().backward()
        optimizer.step()
    assert len(calls) == 3


def test_clips_kept_from_inference_mode_serve_training(weight: torch.nn.Parameter) -> None:
    quantizer = WeightFakeQuantize(4, dim=1)
    with torch.inference_mode():
        quantizer(weight)
    quantizer(weight).sum().backward()
    assert weight.grad is not None


def test_other_settings_other_shapes_and_copies(weight: Tensor) -> None:
    quantizer = WeightFakeQuantize(4, dim=1)
    quantizer(weight)
    assert torch.equal(copy.deepcopy(quantizer)(weight), quantizer(weight))
    assert torch.equal(quantizer.compute_clip(weight[:, :20]), octav_clip(weight[:, :20], 4, dim=1))
    quantizer(weight)
    quantizer.num_bits = 8
    assert torch.equal(quantizer.compute_clip(weight), octav_clip(weight, 8, dim=1))
    assert not quantizer.state_dict()


def test_not_finite_is_refused_every_time(weight: Tensor) -> None:
    quantizer = WeightFakeQuantize(4, dim=1, name="query weight")
    quantizer(weight)
    broken = weight.detach().clone()
    broken[2, 3] = float("nan")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"query weight.*\(6, 40\)"):
            quantizer(broken)
