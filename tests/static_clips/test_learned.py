"""Learned static clips start from the calibrated ones, are trained with the weights, and are restored with them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import BertForQuestionAnswering

from octav_hf import (
    OctavConfig,
    apply_octav,
    calibrate_octav,
    calibrating,
    coverage_report,
    pack_octav,
    uncalibrate_octav,
    unpack_octav,
)
from octav_hf.functional import fake_quantize, fake_quantize_learned_clip
from octav_hf.nn import FakeQuantize, FrozenClips
from octav_hf.nn.frozen_clips import CORRECTION_RATE
from tests.frozen_activations import frozen_activations
from tests.question_answering import Spans, logits
from tests.replicas import replica_of
from tests.test_memory import kept_bytes
from tests.training.interrupted_training import make_trainer

MakeBert = Callable[..., BertForQuestionAnswering]
Tensor = torch.Tensor
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
PARTS = {"query": "attn_head", "key": "attn_head", "probabilities": "attn_head", "value": "channel"}
GROUPS = dict.fromkeys(("input", "probabilities", "value"), "group")


def corrections(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: value for name, value in model.named_parameters() if name.endswith("clip_correction")}


def learned(model: nn.Module, batch: Any, **options: Any) -> Any:
    return calibrate_octav(model, [batch], learned=True, progress_bar=False, **options)


def move(model: nn.Module, seed: int = 0) -> None:
    """Corrections as after training: clips of 0.5 to 2 times the calibrated ones."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for correction in corrections(model).values():
            correction.copy_((torch.rand(correction.shape, generator=generator) * 2 - 1) * 0.7 / CORRECTION_RATE)


def loss_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    output = model(**batch)
    return output.start_logits.square().mean() + output.end_logits.logsumexp(dim=1).mean()


@pytest.mark.parametrize("observer", ["mean", "histogram"])
@pytest.mark.parametrize("granularity", [{}, PARTS, GROUPS], ids=["tensor", "parts", "groups"])
def test_they_begin_as_calibrated(
    small_bert: MakeBert, padded_batch: dict, granularity: dict[str, str], observer: str
) -> None:
    config = OctavConfig(activation_granularity=granularity, group_size=32, asymmetric_activations=True)
    static, model = (apply_octav(small_bert(), config) for _ in range(2))
    calibrate_octav(static, [padded_batch], observer=observer, progress_bar=False)
    learned(model, padded_batch, observer=observer)
    assert corrections(model).keys() == {
        f"{module}.{operand}_quantizer.clip_correction"
        for module, operands in frozen_activations(static).items()
        for operand in operands
    }
    assert frozen_activations(model) == frozen_activations(static)
    assert coverage_report(model) == coverage_report(static)
    assert torch.equal(logits(model, padded_batch), logits(static, padded_batch))


def test_the_clip_of_each_call_and_its_gradient() -> None:
    x = torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    quantizer = FakeQuantize(4, gradient_estimator="pwl")
    quantizer.freeze(FrozenClips(True, torch.tensor([0.5, 1.5])).learning)
    with torch.no_grad():
        quantizer.clip_correction.copy_(torch.tensor([0.64, -0.32]) / CORRECTION_RATE)
    expected = torch.tensor([0.5, 1.5]) * torch.tensor([0.64, -0.32]).exp()
    torch.testing.assert_close(quantizer.frozen.clips, expected)
    for call, clip in enumerate(quantizer.frozen.clips):
        quantizer.clip_correction.grad = None
        own, other = x.clone().requires_grad_(), x.clone().requires_grad_()
        result = quantizer(own, call)
        assert torch.equal(result, fake_quantize(other, clip, 4, gradient="pwl"))
        (result - x).square().sum().backward()
        fake_quantize(other, clip, 4, gradient="pwl").sub(x).square().sum().backward()
        assert torch.equal(own.grad, other.grad)
        step = clip / 8
        change = torch.where((x / step).abs() <= 7, result - x, result).detach()  # d result / d log clip
        change = torch.where((x < -7 * step) & (x >= -8 * step), result - x, change).detach()
        wanted = CORRECTION_RATE * (2 * (result - x) * change).sum() / (50 * 7) ** 0.5
        torch.testing.assert_close(quantizer.clip_correction.grad[call], wanted.detach(), rtol=2e-3, atol=0)
        assert quantizer.clip_correction.grad[1 - call] == 0
    with torch.no_grad():
        assert torch.equal(quantizer(x, 1), fake_quantize(x, quantizer.frozen.clips[1], 4))


@pytest.mark.parametrize("length", [64, 50], ids=["even", "shorter_last_group"])
@pytest.mark.parametrize("gradient", ["ste", "pwl", "mad"])
def test_the_gradient_of_groups(length: int, gradient: str) -> None:
    """Each group is treated like a separate tensor."""
    x, weights = (torch.randn(4, 6, length, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    clips = torch.tensor([0.5, 1.5])
    quantizer = FakeQuantize(4, gradient_estimator=gradient, frozen_group_size=32)
    quantizer.freeze(FrozenClips(True, clips[None]).learning)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    result = quantizer(inputs[0])
    (result * weights).sum().backward()
    own = clips.clone().requires_grad_()
    parts = zip(inputs[1].split(32, dim=-1), own, strict=True)
    expected = torch.cat([fake_quantize_learned_clip(p, c, 4, gradient=gradient) for p, c in parts], dim=-1)
    (expected * weights).sum().backward()
    assert torch.equal(result, expected)
    assert torch.equal(inputs[0].grad, inputs[1].grad)
    torch.testing.assert_close(quantizer.clip_correction.grad[0], CORRECTION_RATE * clips * own.grad)


def test_training_moves_them_and_lowers_the_loss() -> None:
    """With fixed weights, clips that are much too wide lose accuracy, which learning only the clips recovers."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    x = torch.randn(256, 16)
    target = net(x).detach()
    learned(apply_octav(net, OctavConfig(weight_bits=None, activation_bits=3)), 8 * x)
    before, begin = frozen_activations(net), (net(x) - target).square().mean()
    optimizer = torch.optim.Adam(corrections(net).values(), lr=5e-4)
    for _ in range(60):
        optimizer.zero_grad()
        loss = (net(x) - target).square().mean()
        loss.backward()
        optimizer.step()
    assert loss < 0.1 * begin
    for module, operands in frozen_activations(net).items():
        assert operands["input"]["clips"][0] < 0.5 * before[module]["input"]["clips"][0]


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("assign", [True, False])
def test_the_state_dict_decides(small_bert: MakeBert, padded_batch: dict, strict: bool, assign: bool) -> None:
    makers: list[Callable[[nn.Module], Any]] = [
        lambda model: (learned(model, padded_batch), move(model)),
        lambda model: calibrate_octav(model, [padded_batch], progress_bar=False),
        lambda model: None,
    ]
    sources = [apply_octav(small_bert(), OctavConfig()) for _ in makers]
    targets = [apply_octav(small_bert(), OctavConfig()) for _ in makers]
    for maker, source, target in zip(makers, sources, targets, strict=True):
        maker(source), maker(target)
    for target in targets:
        for source in (*sources, sources[0]):
            target.load_state_dict(copy.deepcopy(source.state_dict()), strict=strict, assign=assign)
            assert corrections(target).keys() == corrections(source).keys()
            assert frozen_activations(target) == frozen_activations(source)
            assert torch.equal(logits(target, padded_batch), logits(source, padded_batch))


def test_a_parameter_that_fits_stays_the_same(small_bert: MakeBert, padded_batch: dict) -> None:
    """An optimizer created before loading continues with the loaded parameters."""
    model = learned(apply_octav(small_bert(), OctavConfig()), padded_batch)
    before, state = corrections(model), copy.deepcopy(model.state_dict())
    move(model)
    model.load_state_dict(state)
    assert all(after is before[name] for name, after in corrections(model).items())
    assert all((after == 0).all() for after in corrections(model).values())


def test_a_parameter_that_fits_the_other_grid_stays_the_same() -> None:
    torch.manual_seed(0)
    nets = [apply_octav(nn.Sequential(nn.Linear(8, 8))) for _ in range(2)]
    for net, x in zip(nets, (torch.rand(4, 8), torch.randn(4, 8)), strict=True):  # the unsigned and the signed grid
        learned(net, x)
    move(nets[1])
    (before,) = corrections(nets[0]).values()
    nets[0].load_state_dict(nets[1].state_dict())
    (after,), (wanted,) = corrections(nets[0]).values(), corrections(nets[1]).values()
    assert after is before
    assert torch.equal(after, wanted)
    assert frozen_activations(nets[0]) == frozen_activations(nets[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_checkpoints(small_bert: MakeBert, padded_batch: dict, tmp_path: Path, dtype: torch.dtype) -> None:
    """The training form can be trained further after loading; in packed form, learned clips are static."""
    model = learned(apply_octav(small_bert().to(dtype), OctavConfig(asymmetric_activations=True)), padded_batch)
    move(model)
    model.save_pretrained(tmp_path / "trained")
    loaded = BertForQuestionAnswering.from_pretrained(tmp_path / "trained", dtype="auto").eval()
    for name, correction in corrections(loaded).items():
        assert torch.equal(correction, corrections(model)[name])
        assert correction.requires_grad
        assert correction.dtype == torch.float32
    assert frozen_activations(loaded) == frozen_activations(model)
    assert torch.equal(logits(loaded, padded_batch), logits(model, padded_batch))

    expected, clips = logits(model, padded_batch), frozen_activations(model)
    pack_octav(model).save_pretrained(tmp_path / "packed")
    packed = BertForQuestionAnswering.from_pretrained(tmp_path / "packed", dtype="auto").eval()
    for each in (model, packed):
        assert not corrections(each)
        assert frozen_activations(each) == clips
        assert torch.equal(logits(each, padded_batch), expected)
    assert not corrections(unpack_octav(packed))


def test_they_keep_their_precision(small_bert: MakeBert, padded_batch: dict) -> None:
    model = learned(apply_octav(small_bert(), OctavConfig()), padded_batch)
    move(model)
    nn.Module.to(model, torch.bfloat16)
    other = learned(apply_octav(small_bert(), OctavConfig()), padded_batch)
    move(other)
    for name, correction in corrections(model).items():
        assert correction.dtype == torch.float32
        assert torch.equal(correction, corrections(other)[name])
    assert model.qa_outputs.weight.dtype == torch.bfloat16


def test_calibrating_anew_and_ending_it(small_bert: MakeBert, padded_batch: dict) -> None:
    model = apply_octav(small_bert(), OctavConfig())
    with torch.inference_mode(), calibrating(model, learned=True):
        model(**padded_batch)
    expected = frozen_activations(model)
    move(model)
    assert frozen_activations(model) != expected
    learned(model, padded_batch)  # by dynamic clips
    assert frozen_activations(model) == expected
    loss_of(model, padded_batch).backward()
    assert all(correction.grad is not None for correction in corrections(model).values())
    calibrate_octav(model, [padded_batch], progress_bar=False)
    assert frozen_activations(model) == expected
    assert not corrections(model)
    learned(model, padded_batch)
    uncalibrate_octav(model)
    assert not corrections(model)
    assert not frozen_activations(model)


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not_reentrant"])
def test_checkpointing_gives_the_same_gradients(small_bert: MakeBert, padded_batch: dict, use_reentrant: bool) -> None:
    found = []
    for checkpointing in (False, True):
        model = learned(apply_octav(small_bert(), OctavConfig()), padded_batch).train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
        torch.manual_seed(7)
        loss_of(model, padded_batch).backward()
        found.append(corrections(model))
    for name, correction in found[0].items():
        assert torch.equal(correction.grad, found[1][name].grad)
    assert sum(bool((correction.grad != 0).any()) for correction in found[0].values()) > 15


@pytest.mark.parametrize("gradient", ["ste", "pwl", "mad"])
def test_autocast(small_bert: MakeBert, padded_batch: dict, gradient: str) -> None:
    """Each has a gradient, in float32 and near that of full precision."""
    config = OctavConfig(activation_gradient_estimator=gradient, activation_bits=8)
    model = learned(apply_octav(small_bert(**NO_DROPOUT), config), padded_batch).train()
    found = []
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            loss = loss_of(model, padded_batch)
        loss.backward()
        assert all(correction.grad.dtype == torch.float32 for correction in corrections(model).values())
        found.append(torch.cat([correction.grad for correction in corrections(model).values()]))
    assert torch.corrcoef(torch.stack(found))[0, 1] > 0.9


def test_nothing_more_is_kept_for_the_backward_pass(small_bert: MakeBert, padded_batch: dict) -> None:
    """Except that query, key and value no longer share a quantized input, because each has its own clip."""
    config = OctavConfig(activation_gradient_estimator="pwl")
    kept = []
    for learns in (False, True):
        model = apply_octav(small_bert(**NO_DROPOUT), config).train()
        calibrate_octav(model, [padded_batch], learned=learns, progress_bar=False)
        kept.append(kept_bytes(lambda model=model: loss_of(model, padded_batch), model))
    numbers = 20 * len(corrections(model))
    size = padded_batch["input_ids"].numel() * model.config.hidden_size
    inputs = model.config.num_hidden_layers * 2 * size * (4 + 1)  # float32 and the byte of PWL
    assert kept[1] <= kept[0] + inputs + numbers


@pytest.mark.slow
def test_a_step_is_one_graph(small_bert: MakeBert, padded_batch: dict) -> None:
    torch.compiler.reset()
    model = apply_octav(small_bert(num_hidden_layers=1, **NO_DROPOUT), OctavConfig(asymmetric_activations=True))
    learned(model, padded_batch).train()
    loss_of(model, padded_batch).backward()
    expected = {name: correction.grad.clone() for name, correction in corrections(model).items()}
    model.zero_grad()
    loss_of(torch.compile(model, backend="aot_eager", fullgraph=True), padded_batch).backward()
    for name, correction in corrections(model).items():
        torch.testing.assert_close(correction.grad, expected[name], rtol=1e-2, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("gradient", ["ste", "pwl", "mad"])
def test_a_graph_serves_all_lengths(gradient: str) -> None:
    torch.compiler.reset()
    quantizer = FakeQuantize(4, gradient_estimator=gradient)
    quantizer.freeze(FrozenClips(True, torch.tensor([0.5])).learning)
    compiled = torch.compile(quantizer, backend="aot_eager", fullgraph=True, dynamic=True)
    for length in (20, 30):
        x, found = torch.randn(4, length, generator=torch.Generator().manual_seed(length)), []
        with torch._dynamo.config.patch(error_on_recompile=length == 30):
            for run in (quantizer, compiled):
                quantizer.clip_correction.grad = None
                run(x).square().sum().backward()
                found.append(quantizer.clip_correction.grad)
        torch.testing.assert_close(*found)


def trainer(folder: Path, **arguments: Any) -> Any:
    made = make_trainer(folder, **arguments)
    learned(made.model, Spans()[0]["input_ids"][None])
    return made


@pytest.mark.slow
@pytest.mark.parametrize("calibrated_again", [True, False])
def test_trainer_resumes_exactly(tmp_path: Path, calibrated_again: bool) -> None:
    """Also without another calibration, because the checkpoint contains everything."""
    whole = trainer(tmp_path / "whole")
    whole.train()
    expected = whole.model.state_dict()
    assert all((correction != 0).all() for correction in corrections(whole.model).values())
    resumed = (trainer if calibrated_again else make_trainer)(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    state = resumed.model.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)


def test_what_cannot_learn(small_bert: MakeBert, padded_batch: dict) -> None:
    peft = pytest.importorskip("peft")
    with pytest.raises(ValueError, match="learned=True is for clips of activations; pass batches too"):
        calibrate_octav(apply_octav(small_bert(), OctavConfig()), weights=True, learned=True)
    model = apply_octav(small_bert(), OctavConfig())
    with pytest.raises(ValueError, match="BertForQuestionAnswering is packed, .* call unpack_octav"):
        learned(pack_octav(model), padded_batch)
    model = apply_octav(small_bert(), OctavConfig())
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["query"], r=2))
    with pytest.raises(
        ValueError, match=r"has adapters, whose checkpoints do not contain clips .* leave learned=True out"
    ):
        learned(adapted, padded_batch)
    assert not frozen_activations(model)


def test_adapters_hold_what_was_learned(small_bert: MakeBert, padded_batch: dict) -> None:
    peft = pytest.importorskip("peft")
    model = learned(apply_octav(small_bert(), OctavConfig()), padded_batch)
    move(model)
    expected = logits(model, padded_batch)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["query"], r=2))
    assert not any(correction.requires_grad for correction in corrections(adapted).values())
    assert torch.equal(logits(adapted, padded_batch), expected)


def test_a_wrapped_model_is_refused(small_bert: MakeBert, padded_batch: dict, tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = DistributedDataParallel(apply_octav(small_bert(), OctavConfig()))
        with pytest.raises(
            ValueError, match="wrapped in DistributedDataParallel or sharded.* calibrate the model before"
        ):
            learned(model, padded_batch)
        model = apply_octav(small_bert(), OctavConfig())
        fully_shard(model.bert, mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(
            ValueError, match="wrapped in DistributedDataParallel or sharded.* calibrate the model before"
        ):
            learned(model, padded_batch)
    finally:
        torch.distributed.destroy_process_group()


def test_replicas_use_and_train_them(small_bert: MakeBert, padded_batch: dict) -> None:
    """As in ``nn.DataParallel``, whose replicas have no parameters."""
    model = learned(apply_octav(small_bert(**NO_DROPOUT), OctavConfig()), padded_batch)
    move(model)
    expected = loss_of(model, padded_batch)
    expected.backward()
    gradients = {name: value.grad for name, value in corrections(model).items()}
    model.zero_grad(set_to_none=True)
    loss = loss_of(replica_of(model), padded_batch)
    assert torch.equal(loss, expected)
    loss.backward()
    for name, value in corrections(model).items():
        assert value.grad.any(), name
        torch.testing.assert_close(value.grad, gradients[name])


@pytest.mark.parametrize(
    ("correction", "problem"),
    [
        (torch.zeros(2), r"have the shape \(1,\), and their clip_correction \(2,\)"),
        (torch.tensor([torch.nan]), "contain a negative value, NaN or Inf"),
        (torch.tensor([100.0]), "contain a negative value, NaN or Inf"),
    ],
    ids=["shape", "nan", "overflow"],
)
def test_impossible_corrections_are_refused(correction: Tensor, problem: str) -> None:
    model = learned(apply_octav(nn.Sequential(nn.Linear(8, 4)), OctavConfig()), torch.randn(3, 8))
    state = model.state_dict() | {"0.input_quantizer.clip_correction": correction}
    with pytest.raises(RuntimeError, match=rf"0.input_quantizer: the frozen clips in the state dict {problem}"):
        model.load_state_dict(state)
    assert corrections(model)["0.input_quantizer.clip_correction"].tolist() == [0.0]
    del state["0.input_quantizer.clips"]
    with pytest.raises(RuntimeError, match=r"are \['clip_correction'\]; there must be one tensor clips"):
        model.load_state_dict(state)
