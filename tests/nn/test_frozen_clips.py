"""Quantizers with frozen clips, and freezing observed clips."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from octav_hf.functional import CLIP_RULES, fake_quantize, octav_clip
from octav_hf.functional.grid import round_to_grid
from octav_hf.nn import FakeQuantize, FrozenClips, MeanObserver
from octav_hf.nn.shared_inputs import quantize_input, shared_inputs

Tensor = torch.Tensor


class Operations(TorchDispatchMode):
    """Records the names of the operations that run on more than one number."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if any(isinstance(arg, Tensor) and arg.numel() > 1 for arg in args):
            self.names.append(func._schema.name.partition("::")[2])
        return func(*args, **(kwargs or {}))


def frozen(*clips: float, signed: bool = True, offset: float | None = None, **settings: Any) -> FakeQuantize:
    """A quantizer with these frozen clips, one per call."""
    quantizer = FakeQuantize(**{"num_bits": 4} | settings)
    quantizer.freeze(FrozenClips(signed, torch.tensor(clips), None if offset is None else torch.tensor(offset)))
    return quantizer


@pytest.fixture
def x() -> Tensor:
    return torch.randn(6, 50, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("signed", [True, False])
def test_takes_the_clip_of_its_use_whatever_the_data_are(x: Tensor, signed: bool) -> None:
    quantizer = frozen(0.5, 1.7, signed=signed, gradient_estimator="pwl")
    for scale in (0.1, 1.0, 30.0):
        for use, clip in enumerate((0.5, 1.7)):
            expected = round_to_grid(scale * x, torch.tensor(clip), 4, signed=signed)
            assert torch.equal(quantizer(scale * x, use), expected)
    assert torch.equal(quantizer(x), quantizer(x, 0))


@pytest.mark.parametrize("signed", [True, False, None])
def test_reads_no_statistics_off_the_data(x: Tensor, signed: bool | None, monkeypatch: pytest.MonkeyPatch) -> None:
    dynamic = FakeQuantize(4, gradient_estimator="ste", signed=signed)
    with Operations() as rounding:
        fake_quantize(x, torch.tensor(1.0), 4, signed=signed is True, gradient="ste")
    with Operations() as operations:
        dynamic(x)
    assert operations.names != rounding.names
    assert operations.names[-len(rounding.names) :] == rounding.names
    static = frozen(1.0, signed=signed is True, clip="refused", gradient_estimator="ste")
    monkeypatch.setitem(CLIP_RULES, "refused", lambda *args, **kwargs: pytest.fail("the clipping rule was called"))
    with Operations() as operations:
        static(x)
    assert operations.names == rounding.names


@pytest.mark.parametrize("gradient", ["ste", "pwl", "mad"])
def test_gradients_are_those_of_the_estimator(x: Tensor, gradient: str) -> None:
    static = frozen(0.8, gradient_estimator=gradient)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    static(inputs[0]).square().sum().backward()
    fake_quantize(inputs[1], torch.tensor(0.8), 4, gradient=gradient).square().sum().backward()
    assert torch.equal(inputs[0].grad, inputs[1].grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_clip_is_as_exact_as_the_data_allow(x: Tensor, dtype: torch.dtype) -> None:
    clip = 1 / 3
    quantizer = FakeQuantize(3)
    quantizer.freeze(FrozenClips(True, torch.tensor([clip], dtype=torch.promote_types(dtype, torch.float32))))
    quantizer.to(torch.bfloat16)
    precise = torch.tensor(clip, dtype=torch.promote_types(dtype, torch.float32))
    output = quantizer(x.to(dtype))
    assert output.dtype == dtype
    assert torch.equal(output, round_to_grid(x.to(dtype), precise, 3).to(dtype))


def test_nan_stays_nan_without_an_error() -> None:
    quantizer = frozen(1.0)
    assert quantizer(torch.tensor([torch.nan, 0.5])).isnan().tolist() == [True, False]


def test_says_that_it_is_frozen() -> None:
    quantizer = frozen(0.5, 1.25, signed=False)
    assert repr(quantizer) == "FakeQuantize(4 bits [0, 15], clip=octav per tensor frozen, [2], gradient_estimator=mad)"


def test_is_compiled_without_a_break(x: Tensor) -> None:
    torch.compiler.reset()
    quantizer = frozen(0.5, 1.7, gradient_estimator="pwl")
    compiled = torch.compile(quantizer, backend="aot_eager", fullgraph=True)
    for values in (x, torch.cat([x, x]), torch.cat([x, x, x], dim=1)):  # the later ones with sizes left open
        inputs = [values.clone().requires_grad_() for _ in range(2)]
        outputs = [module(y, 1) for module, y in zip((compiled, quantizer), inputs, strict=True)]
        assert torch.equal(*outputs)
        for output in outputs:
            output.sum().backward()
        assert torch.equal(*(y.grad for y in inputs))


def test_layers_share_an_input_only_where_clips_are_equal(x: Tensor) -> None:
    first, equal, other, unsigned = frozen(1.0), frozen(1.0), frozen(2.0), frozen(1.0, signed=False)
    dynamic = FakeQuantize(4)
    with shared_inputs():
        result = quantize_input(first, x)
        assert quantize_input(equal, x) is result
        for quantizer in (other, unsigned, dynamic):
            assert torch.equal(quantize_input(quantizer, x), quantizer(x))
            assert not torch.equal(quantize_input(quantizer, x), result)
    equal.clips.fill_(2.0)  # as loading a state dict does
    with shared_inputs():
        result = quantize_input(first, x)
        assert torch.equal(quantize_input(equal, x), quantize_input(other, x))
        assert not torch.equal(quantize_input(equal, x), result)


def test_each_that_is_observed_is_called(x: Tensor) -> None:
    observed = [FakeQuantize(4, name=name) for name in "ab"]
    for quantizer in observed:
        quantizer.observer = MeanObserver(quantizer)
    with shared_inputs():
        for quantizer in observed:
            quantize_input(quantizer, x)
    for quantizer in observed:
        assert same(quantizer.observer.frozen(), True, float(octav_clip(x, 4)))


def same(clips: FrozenClips | None, signed: bool, *expected: float, offset: float | None = None) -> bool:
    """Whether these are the clips of the calls."""
    assert clips is not None
    got = clips.signed, clips.clips.tolist(), None if clips.offset is None else clips.offset.item()
    return got == (signed, pytest.approx(expected, rel=1e-6), offset)


def observe(signed: bool | None, *tensors: Tensor) -> FrozenClips | None:
    """The frozen clips after calls on these tensors, each on its dynamic grid."""
    quantizer, dynamic = frozen(9.0), FakeQuantize(4, signed=signed)
    quantizer.signed = signed
    quantizer.observer = MeanObserver(quantizer)
    for tensor in tensors:
        assert torch.equal(quantizer(tensor), dynamic(tensor))
    return quantizer.observer.frozen()


def mean_clip(signed: bool, *tensors: Tensor) -> float:
    return sum(float(octav_clip(tensor, 4, signed=signed)) for tensor in tensors) / len(tensors)


def test_one_negative_value_decides_for_the_signed_grid(x: Tensor) -> None:
    positive, larger = x.abs(), 5 * x[:3].abs()
    assert same(observe(None, positive, larger), False, mean_clip(False, positive, larger))
    for order in ((positive, larger, x), (x, positive, larger), (positive, x, larger)):
        assert same(observe(None, *order), True, mean_clip(True, *order))
    assert same(observe(True, positive), True, mean_clip(True, positive))
    assert same(observe(False, x), False, mean_clip(False, x))


def test_an_empty_tensor_does_not_count(x: Tensor) -> None:
    empty = torch.empty(0, 3)
    for signed in (True, None):
        assert same(observe(signed, x, empty, 3 * x), True, mean_clip(True, x, 3 * x))
        assert observe(signed, empty) is None
        assert observe(signed) is None


def record(observer: MeanObserver, use: int, count: int = 1, **clips: list[float] | float) -> None:
    """Record the clips of a call on the grids ``signed`` and ``unsigned``."""
    tensors = {name == "signed": torch.tensor(value, dtype=torch.float64) for name, value in clips.items()}
    observer.record(use, tensors, count, None, like=torch.empty(0))


def test_each_use_has_its_own_mean() -> None:
    observer = MeanObserver(FakeQuantize(4))
    for clips in ((1.0, 10.0), (2.0, 40.0)):
        for use, clip in enumerate(clips):
            record(observer, use, signed=clip)
    assert same(observer.frozen(), True, 1.5, 25.0)
    assert observer.call_counts == {2}
    record(observer, 0, signed=1.0)
    assert observer.call_counts == {1, 2}


def test_the_mean_of_several_observations_is_over_all_of_them() -> None:
    observer = MeanObserver(FakeQuantize(4))
    record(observer, 0, 3, signed=[3.0, 6.0])
    record(observer, 0, 1, signed=[1.0, 10.0])
    assert observer.frozen().clips.tolist() == [[1.0, 4.0]]
    with pytest.raises(ValueError, match=r"clips of shape \(3,\) after clips of shape \(2,\)"):
        record(observer, 0, 1, signed=[1.0, 1.0, 1.0])


def test_all_uses_have_one_grid() -> None:
    observer = MeanObserver(FakeQuantize(4))
    record(observer, 0, unsigned=1.0, signed=2.0)
    record(observer, 1, signed=3.0)
    assert same(observer.frozen(), True, 2.0, 3.0)


def test_uses_with_clips_of_different_shapes_cannot_be_frozen() -> None:
    observer = MeanObserver(FakeQuantize(4))
    record(observer, 0, signed=[1.0, 2.0])
    record(observer, 1, signed=3.0)
    with pytest.raises(ValueError, match=r"clips of different shapes in one forward pass: \[\(\), \(2,\)\]"):
        observer.frozen()
