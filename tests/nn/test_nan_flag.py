"""Quantizers record NaN in compiled graphs and on other devices than the CPU, where no error can be raised."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from octav_hf import OctavConfig, apply_octav, check_finite
from octav_hf.functional import CLIP_RULES, max_clip, register_clip_rule
from octav_hf.nn import FakeQuantize, WeightFakeQuantize
from octav_hf.nn.nan_flag import met_nan

Tensor = torch.Tensor

SETTINGS = {
    "octav": {},
    "mse": {"clip": "mse", "signed": None},
    "max": {"clip": "max", "signed": False},
    "percentile": {"clip": "percentile", "signed": None},
    "per token": {"signed": None, "dim": -1},
    "asymmetric": {"signed": None, "asymmetric": True},
}


def compiled(module: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return torch.compile(module, backend="aot_eager", fullgraph=True)


def with_one(value: float, *shape: int) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    x[-1, 0] = value
    return x


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_a_compiled_quantizer_remembers(settings: dict[str, object]) -> None:
    torch._dynamo.reset()
    quantizer = FakeQuantize(4, **settings)
    graphs = CompileCounterWithBackend("aot_eager")
    quantize = torch.compile(quantizer, backend=graphs, fullgraph=True)
    for value in (float("nan"), float("inf"), float("-inf")):
        quantize(with_one(1.0, 4, 9))
        assert met_nan([quantizer]) == [False]
        y = quantize(with_one(value, 4, 9))
        assert y[-1].isnan().all(), "the clip is NaN, not only the value"
        quantize(with_one(1.0, 4, 9))
        assert met_nan([quantizer]) == [True]
        quantizer.forget()
    assert graphs.frame_count == 1


def test_on_another_device_it_remembers_without_a_read() -> None:
    """On fake CUDA tensors, where every read of a value raises an error."""
    quantizers = [FakeQuantize(4, **settings) for settings in SETTINGS.values()]
    quantizers.append(WeightFakeQuantize(4, dim=1))
    with FakeTensorMode():
        for quantizer in quantizers:
            quantizer(torch.empty(6, 40, device="cuda"))
            assert quantizer._sum_of_clips.device.type == "cuda"
        assert met_nan(quantizers) == [False] * len(quantizers)


class SameInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.query(x) + self.key(x)


def test_records_that_a_graph_starts_stay_apart() -> None:
    """Quantizers of one input have equal sums, and a second graph modifies each of them."""
    torch._dynamo.reset()
    model = apply_octav(SameInput(), OctavConfig.paper())
    quantizers = [module for module in model.modules() if isinstance(module, FakeQuantize)]
    for quantizer in quantizers:
        quantizer.to("meta")  # so that the graph moves the record to where the data are
    run = torch.compile(model)
    for _ in range(2):
        run(with_one(1.0, 4, 8)).sum().backward()
    assert met_nan(quantizers) == [False] * 4
    run(with_one(float("nan"), 4, 8))
    assert met_nan(quantizers) == [quantizer.name.endswith("input") for quantizer in quantizers]


def test_records_start_where_the_weights_are() -> None:
    """Before the model is compiled, because a graph that starts them is compiled again."""
    with FakeTensorMode():
        model = SameInput()
        for layer in (model.query, model.key):
            layer.weight = nn.Parameter(torch.empty(8, 8, device="cuda"))
        apply_octav(model, OctavConfig.paper())
        records = [module._sum_of_clips for module in model.modules() if isinstance(module, FakeQuantize)]
    assert [record.device.type for record in records] == ["cuda"] * 4


def test_records_start_when_weights_are_loaded(
    small_bert: Callable[..., nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = apply_octav(small_bert(), OctavConfig.paper())
    model.save_pretrained(tmp_path)
    started: list[bool] = []
    name = "octav_hf.integrations.transformers_quantizer.start_on_devices"
    monkeypatch.setattr(name, lambda model: started.append(any(p.is_meta for p in model.parameters())))
    type(model).from_pretrained(tmp_path)
    assert started == [False]


def test_on_the_cpu_the_error_comes_at_once_and_nothing_is_remembered() -> None:
    quantizer = FakeQuantize(4, name="layer.3 input")
    with pytest.raises(ValueError, match=r"layer.3 input: octav_clip: x of shape \(4, 9\).*1 NaN"):
        quantizer(with_one(float("nan"), 4, 9))
    assert met_nan([quantizer]) == [False]


def net() -> nn.Module:
    torch.manual_seed(0)
    return apply_octav(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), OctavConfig())


def test_check_finite_names_the_first_operand() -> None:
    model = net()
    check_finite(model)
    compiled(model)(with_one(float("inf"), 3, 8))
    with pytest.raises(ValueError, match="^0 input: this operand held NaN or Inf, so.*the first of 2 such operands"):
        check_finite(model)
    check_finite(model)  # it is told once
    with torch.no_grad():
        model[2].weight[1, 2] = float("nan")
    compiled(model)(torch.ones(3, 8))
    with pytest.raises(ValueError, match="^2 weight: this operand held NaN or Inf, so it has no clipping scalar; find"):
        check_finite(model)


def test_check_finite_of_a_quantizer_without_a_name() -> None:
    model = nn.Sequential(nn.Identity(), FakeQuantize(4))
    compiled(model)(torch.tensor([float("nan")]))
    with pytest.raises(ValueError, match="^1: this operand"):
        check_finite(model)


@pytest.fixture
def nan_memory() -> Iterator[None]:
    """Uninitialized memory contains NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("nan_memory")
def test_a_rule_of_a_user_is_computed_for_both_signs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("octav_hf.functional.registry.CLIP_RULES", dict(CLIP_RULES))
    monkeypatch.setitem(CLIP_RULES, "mine", None)
    monkeypatch.delitem(CLIP_RULES, "mine")
    signs: list[object] = []

    @register_clip_rule("mine")
    def mine(x: Tensor, num_bits: int, *, signed: bool = True, dim: object = None) -> Tensor:
        signs.append(signed)
        return max_clip(x, num_bits, signed=signed, dim=dim)

    x = with_one(1.0, 40, 9)
    for values in (x, x.abs(), x.clamp(min=-0.1)):
        for asymmetric in (False, True):
            settings = {"signed": None, "asymmetric": asymmetric, "gradient_estimator": "pwl"}
            got = FakeQuantize(4, clip="mine", **settings)(values)
            assert torch.equal(got, FakeQuantize(4, clip="max", **settings)(values))
    assert all(isinstance(sign, bool) for sign in signs)


def test_it_is_no_part_of_the_model() -> None:
    quantizer = FakeQuantize(4)
    before = pickle.dumps(quantizer)
    compiled(lambda x: quantizer(x))(torch.tensor([float("nan")]))
    assert not quantizer.state_dict()
    assert not list(quantizer.buffers())
    assert pickle.dumps(quantizer) == before
    for copied in (copy.deepcopy(quantizer), pickle.loads(before)):
        assert met_nan([copied]) == [False]
        torch._dynamo.reset()
        compiled(copied)(torch.tensor([float("nan")]))
        assert met_nan([copied]) == [True]
    assert met_nan([quantizer]) == [True]


def test_it_moves_with_the_module_and_keeps_its_dtype() -> None:
    quantizer = FakeQuantize(4)
    compiled(quantizer)(torch.tensor([float("nan")]))
    assert met_nan([quantizer.half()]) == [True]
    assert quantizer._sum_of_clips.dtype == torch.float32
    quantizer.to("meta")
    assert quantizer._sum_of_clips.is_meta
    assert met_nan([quantizer.to_empty(device="cpu")]) == [False]


def test_a_model_made_in_inference_mode_can_be_trained() -> None:
    with torch.inference_mode():
        quantizer = FakeQuantize(4)
    torch._dynamo.reset()
    x = with_one(float("nan"), 4, 9).requires_grad_()
    compiled(quantizer)(x).sum().backward()
    assert met_nan([quantizer]) == [True]


def test_a_model_first_compiled_in_inference_mode_can_be_trained() -> None:
    """The compiled graph creates the flag, because it is not on the device of the clips yet."""
    quantizer = FakeQuantize(4).eval().to("meta")
    torch._dynamo.reset()
    quantize = compiled(quantizer)
    x = with_one(float("nan"), 4, 9)
    with torch.inference_mode():
        quantize(x)
    assert met_nan([quantizer]) == [True]
    quantizer.forget()
    assert met_nan([quantizer]) == [False]
    torch._dynamo.reset()
    quantizer.to("meta")
    with torch.inference_mode():
        quantize(x.nan_to_num())
    quantizer.train()
    quantize(x.requires_grad_()).sum().backward()
    assert met_nan([quantizer]) == [True]
