"""Frozen clips in state dicts: freezing and unfreezing by loading, and invalid clips."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertConfig, BertForMaskedLM, BertForQuestionAnswering

from octav_hf import OctavConfig, apply_octav, calibrate_octav, pack_octav, remove_octav
from tests.frozen_activations import frozen_activations
from tests.question_answering import logits

MakeBert = Callable[..., BertForQuestionAnswering]
Tensor = torch.Tensor
HEADS = {"query": "attn_head", "key": "attn_head", "probabilities": "attn_head", "value": "channel"}


def net(seed: int = 0) -> nn.Sequential:
    """Two quantized layers, of which the second has an unsigned input, asymmetric."""
    torch.manual_seed(seed)
    layers = nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4)
    return apply_octav(nn.Sequential(*layers), OctavConfig(asymmetric_activations=True))


def data(seed: int = 1) -> Tensor:
    return torch.randn(6, 8, generator=torch.Generator().manual_seed(seed))


def frozen(seed: int = 0, **dtype: Any) -> nn.Sequential:
    """The same with all clips frozen."""
    model = net(seed).to(**dtype) if dtype else net(seed)
    return calibrate_octav(model, [data().to(**dtype)], weights=True, progress_bar=False)


NAMES = {"0.input_quantizer.clips", "0.weight_quantizer.clips", "2.weight_quantizer.clips"}
NAMES |= {"2.input_quantizer.unsigned_clips", "2.input_quantizer.offset"}


def same(model: nn.Module, other: nn.Module, x: Tensor | None = None) -> bool:
    x = data(2) if x is None else x
    return torch.equal(model(x), other(x)) and model.state_dict().keys() == other.state_dict().keys()


def test_names_shapes_and_dtypes() -> None:
    model = frozen()
    state = model.state_dict()
    assert state.keys() - net().state_dict().keys() == NAMES
    assert {name: tuple(state[name].shape) for name in NAMES} == {
        "0.input_quantizer.clips": (1,),
        "0.weight_quantizer.clips": (16, 1),
        "2.weight_quantizer.clips": (4, 1),
        "2.input_quantizer.unsigned_clips": (1,),
        "2.input_quantizer.offset": (),
    }
    for dtype in (torch.bfloat16, torch.float16):
        assert {copy.deepcopy(model).to(dtype).state_dict()[name].dtype for name in NAMES} == {torch.float32}
    double = frozen(dtype=torch.float64)
    assert {double.state_dict()[name].dtype for name in NAMES} == {torch.float64}
    assert {double.float().state_dict()[name].dtype for name in NAMES} == {torch.float64}
    assert model.to("meta").state_dict()["0.input_quantizer.clips"].is_meta
    assert remove_octav(frozen()).state_dict().keys() == net().state_dict().keys()


@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
@pytest.mark.parametrize("strict", [False, True], ids=["not strict", "strict"])
def test_the_state_dict_decides(strict: bool, assign: bool) -> None:
    static, dynamic = frozen(), net()
    for target in (net(1), frozen(1)):
        for source in (static, dynamic, static):
            result = target.load_state_dict(source.state_dict(), strict=strict, assign=assign)
            assert result.missing_keys == result.unexpected_keys == []
            assert same(target, source)
    assert target[0].input_quantizer.clips is not static[0].input_quantizer.clips or assign


def test_buffers_that_fit_stay_the_same_tensors() -> None:
    target = frozen(1)
    clips = target[0].input_quantizer.clips
    target.load_state_dict(frozen().state_dict())
    assert target[0].input_quantizer.clips is clips


def test_a_state_dict_of_other_modules_changes_nothing() -> None:
    static = frozen()
    before = {name: static.state_dict()[name].clone() for name in NAMES}
    static.load_state_dict({"2.bias": torch.zeros(4)}, strict=False)
    static.load_state_dict({"adapter.weight": torch.zeros(4)}, strict=False)
    assert all(torch.equal(static.state_dict()[name], tensor) for name, tensor in before.items())
    static.load_state_dict({"0.weight": torch.ones(16, 8), "2.input_quantizer.clips": torch.ones(1)}, strict=False)
    assert not static[0].input_quantizer.is_frozen
    assert not static[0].weight_quantizer.is_frozen
    assert static[2].input_quantizer.clips.tolist() == [1.0]
    assert static[2].input_quantizer.unsigned_clips is static[2].input_quantizer.offset is None
    assert static[2].weight_quantizer.is_frozen


INPUT, WEIGHT = "0.input_quantizer.clips", "0.weight_quantizer.clips"


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({INPUT: torch.ones(2)}, r"0.input_quantizer: .* have the shape \(2,\), which must be \[calls\]"),
        ({INPUT: torch.ones(0)}, r"the shape \(0,\)"),
        ({INPUT: torch.ones(())}, r"the shape \(\)"),
        ({INPUT: torch.ones(1, 4)}, r"the shape \(1, 4\), .* one clip for the tensor"),
        ({INPUT: torch.tensor([-1.0])}, "contain a negative value, NaN or Inf"),
        ({INPUT: torch.tensor([torch.nan])}, "contain a negative value, NaN or Inf"),
        ({INPUT: torch.ones(1, dtype=torch.int32)}, "dtype torch.int32"),
        ({"0.input_quantizer.unsigned_clips": torch.ones(1)}, "there must be one tensor clips or unsigned_clips"),
        ({"0.input_quantizer.offset": torch.tensor(-1.0)}, "has no asymmetric grid"),
        ({"2.input_quantizer.offset": torch.tensor(1.0)}, "2.input_quantizer: .*offset is NaN, Inf or positive"),
        ({WEIGHT: torch.ones(15, 1)}, r"0.weight_quantizer: .*\(15, 1\).* shape \(16, 8\) needs .* \(16, 1\)"),
        ({WEIGHT: torch.full((16, 1), torch.inf)}, "0.weight_quantizer: .*negative value, NaN or Inf"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
@pytest.mark.parametrize("make", [net, frozen], ids=["dynamic", "frozen"])
def test_impossible_clips_are_refused(make: Callable, changes: dict[str, Tensor], problem: str) -> None:
    model = make(1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if name in NAMES}
    owner = next(iter(changes)).rpartition(".")[0]
    with pytest.raises(RuntimeError, match=problem):
        model.load_state_dict(frozen().state_dict() | changes)
    after = {name: tensor for name, tensor in model.state_dict().items() if name.startswith(owner)}
    assert after.keys() == {name for name in before if name.startswith(owner)}
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items())


def test_clips_follow_the_module_to_its_device() -> None:
    target = net(1).to("meta")
    target.load_state_dict(frozen().state_dict(), assign=True)
    assert same(target, frozen())


@pytest.mark.parametrize("assign", [False, True])
def test_a_narrower_state_dict_leaves_full_precision(assign: bool) -> None:
    static, packed = frozen(), pack_octav(net())
    for model in (static, packed):
        names = [name for name in model.state_dict() if "_quantizer." in name and not name.endswith("packed_data")]
        narrow = {name: x.bfloat16() if name in names else x for name, x in model.state_dict().items()}
        model.load_state_dict(narrow, assign=assign)
        assert names
        assert {model.state_dict()[name].dtype for name in names} == {torch.float32}
        assert narrow[names[0]].dtype == torch.bfloat16


@pytest.mark.parametrize("use_buffers", [False, True])
def test_averaged_copies(use_buffers: bool) -> None:
    static = frozen()
    average = AveragedModel(static, use_buffers=use_buffers)
    assert same(average.module, static)
    for _ in range(2):
        average.update_parameters(static)
    assert same(average.module, static)
    later = AveragedModel(net(1))
    later.module.load_state_dict(static.state_dict())
    assert same(later.module, static)
    AveragedModel(net(1)).load_state_dict(average.state_dict() | {"n_averaged": torch.tensor(1)})


def test_functional_call_takes_other_clips() -> None:
    static = frozen()
    state = dict(static.named_parameters()) | dict(static.named_buffers())
    other = frozen(1)
    result = torch.func.functional_call(static, dict(other.named_parameters()) | dict(other.named_buffers()), data(2))
    assert torch.equal(result, other(data(2)))
    assert torch.equal(torch.func.functional_call(static, state, data(2)), static(data(2)))


@pytest.mark.parametrize("granularity", [{}, HEADS], ids=["tensor", "heads"])
def test_an_attention_modules_clips(small_bert: MakeBert, padded_batch: dict, granularity: dict[str, str]) -> None:
    static, target = (apply_octav(small_bert(), OctavConfig(activation_granularity=granularity)) for _ in range(2))
    dynamic = copy.deepcopy(static.state_dict())
    calibrate_octav(static, [padded_batch], progress_bar=False)
    target.load_state_dict(static.state_dict())
    assert frozen_activations(target) == frozen_activations(static)
    assert torch.equal(logits(target, padded_batch), logits(static, padded_batch))
    query = {name: tensor for name, tensor in dynamic.items() if ".query." in name}
    target.load_state_dict(query, strict=False)
    lost = {name for name in frozen_activations(static) if name.endswith(".query")}
    assert frozen_activations(target).keys() == frozen_activations(static).keys() - lost
    target.load_state_dict(dynamic)
    assert frozen_activations(target) == {}


def test_a_tied_heads_clips(padded_batch: dict) -> None:
    """A file contains a tied weight once, and of the head only the bias."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    model = apply_octav(BertForMaskedLM(BertConfig(vocab_size=100, **sizes)).eval())
    head = "cls.predictions.decoder"
    dynamic = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(head)}
    calibrate_octav(model, [padded_batch], progress_bar=False)
    adapter = {"adapter.weight": torch.zeros(2)}
    for wrapper in (model, nn.Sequential(model)):
        calibrate_octav(model, [padded_batch], progress_bar=False)
        wrapper.load_state_dict(adapter, strict=False)
        assert head in frozen_activations(model)
        prefix = "" if wrapper is model else "0."
        wrapper.load_state_dict({f"{prefix}{name}": tensor for name, tensor in dynamic.items()}, strict=False)
        assert frozen_activations(model) == {}


class HostWork(TorchDispatchMode):
    """Counts tensors created from Python numbers, and numbers read from tensors."""

    made = ("lift_fresh", "full", "new_full", "full_like", "scalar_tensor", "arange", "_local_scalar_dense", "item")

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = func._schema.name.partition("::")[2]
        self.counts.update([name] if name in self.made else [])
        return func(*args, **(kwargs or {}))


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("granularity", [{}, HEADS], ids=["tensor", "heads"])
@pytest.mark.parametrize("form", ["training", "packed"])
def test_frozen_clips_are_no_work_for_the_host(
    small_bert: MakeBert,
    padded_batch: dict,
    implementation: str,
    granularity: dict[str, str],
    form: str,
) -> None:
    batch = {"input_ids": padded_batch["input_ids"]}  # for a mask it is asked whether a row attends to nothing

    def host_work(model: nn.Module) -> Counter[str]:
        model(**batch)  # once, for what is kept
        with HostWork() as work:
            model(**batch)
        return work.counts

    arguments = {"num_hidden_layers": 12, "attn_implementation": implementation}
    expected = host_work(small_bert(**arguments))
    model = apply_octav(small_bert(**arguments), OctavConfig(activation_granularity=granularity))
    assert not host_work(model) <= expected
    calibrate_octav(model, [batch], weights=True, progress_bar=False)
    if form == "packed":
        pack_octav(model)
    assert host_work(model) <= expected
