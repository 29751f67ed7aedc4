"""With autocast, and in a half-precision model, every matmul runs in low precision."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertForQuestionAnswering, ResNetForImageClassification

from octav_hf import OctavConfig, apply_octav, calibrate_octav
from octav_hf.coverage.operand_watch import MATMULS as WATCHED
from octav_hf.nn import FakeQuantize
from tests.twins import octav_clip_twin

MATMULS = {torch.ops.aten.mm, torch.ops.aten.bmm, torch.ops.aten.addmm, torch.ops.aten.baddbmm, torch.ops.aten.matmul}
MakeBert = Callable[..., BertForQuestionAnswering]


class MatmulDtypes(TorchDispatchMode):
    """Records the dtypes of all operands of these operations."""

    def __init__(self, operations: set[Any] = MATMULS) -> None:
        super().__init__()
        self.operations = operations
        self.seen: list[torch.dtype] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.overloadpacket in self.operations:
            self.seen += [a.dtype for a in args if isinstance(a, torch.Tensor) and a.is_floating_point()]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_autocast(small_bert: MakeBert, padded_batch: dict, implementation: str, dtype: torch.dtype) -> None:
    model = apply_octav(small_bert(attn_implementation=implementation), OctavConfig()).train()
    with MatmulDtypes() as matmuls:
        with torch.autocast("cpu", dtype=dtype):
            output = model(**padded_batch)
            loss = output.start_logits.float().sum()
        loss.backward()
    # 13 linear layers and 2 attentions of 2 matmuls, each with two backward matmuls; the first layers' inputs have one.
    assert len(matmuls.seen) >= 2 * 3 * (13 + 4) - 2
    assert set(matmuls.seen) == {dtype}
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), name


def test_autocast_logits_are_near_full_precision(small_bert: MakeBert, padded_batch: dict) -> None:
    model = apply_octav(small_bert(), OctavConfig(weight_bits=8, activation_bits=8))
    with torch.no_grad():
        expected = model(**padded_batch).start_logits
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = model(**padded_batch).start_logits
    assert (got - expected).abs().max() < 0.1 * expected.abs().max()


def test_a_bfloat16_model(small_bert: MakeBert, padded_batch: dict) -> None:
    model = apply_octav(small_bert().to(torch.bfloat16), OctavConfig()).train()
    with MatmulDtypes() as matmuls:
        model(**padded_batch).start_logits.sum().backward()
    assert set(matmuls.seen) == {torch.bfloat16}


def test_autocast_of_convolutions(small_resnet: Callable[..., ResNetForImageClassification]) -> None:
    model = apply_octav(small_resnet(), OctavConfig()).train()
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with MatmulDtypes({torch.ops.aten.convolution}) as convolutions:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(images).logits.float().square().sum()
        loss.backward()
    layers = sum(isinstance(module, nn.Conv2d) for module in model.modules())
    assert convolutions.seen == [torch.bfloat16] * 2 * layers
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name


class FloatMatmuls(TorchDispatchMode):
    """Collects the dtypes of all matmul operands outside quantizers, by module."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.seen: dict[str, set[torch.dtype]] = {}
        self._running: list[str] = []
        self._quantizers = 0
        for name, module in model.named_modules():
            module.register_forward_pre_hook(lambda module, args, n=name: self._enter(module, n))
            module.register_forward_hook(lambda module, args, output: self._leave(module))

    def _enter(self, module: nn.Module, name: str) -> None:
        self._quantizers += isinstance(module, FakeQuantize)
        self._running.append(name)

    def _leave(self, module: nn.Module) -> None:
        self._quantizers -= isinstance(module, FakeQuantize)
        self._running.pop()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = func.overloadpacket.__name__
        if name in WATCHED and not self._quantizers:
            operands = {args[position].dtype for position in WATCHED[name]}
            where = self._running[-1] if self._running else "backward"
            self.seen.setdefault(where, set()).update(operands)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "model_in_half_precision"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("frozen", [False, True], ids=["dynamic", "frozen"])
def test_nothing_multiplies_in_float32(
    small_bert: MakeBert,
    padded_batch: dict,
    implementation: str,
    dtype: torch.dtype,
    autocast: bool,
    frozen: bool,
) -> None:
    """Over all matmul operations of PyTorch, forward and backward."""
    model = apply_octav(small_bert(attn_implementation=implementation), OctavConfig(embedding_bits=8))
    if frozen:
        calibrate_octav(model, [padded_batch], progress_bar=False)
    model.to(torch.float32 if autocast else dtype).train()
    with FloatMatmuls(model) as products:
        with torch.autocast("cpu", dtype=dtype, enabled=autocast):
            loss = model(**padded_batch).start_logits.float().square().mean()
        loss.backward()
    assert len(products.seen) == 13 + 2 + 1, "linear layers, attentions, and the backward pass"
    assert {d for dtypes in products.seen.values() for d in dtypes} == {dtype}, products.seen


@pytest.mark.parametrize("mode", ["autocast_bfloat16", "autocast_float16", "bfloat16", "float16"])
def test_clips_are_those_of_the_same_tensor_in_float64(small_bert: MakeBert, padded_batch: dict, mode: str) -> None:
    """Every clip of a pass against the float64 recursion on the same values."""
    dtype = getattr(torch, mode.removeprefix("autocast_"))
    model = apply_octav(small_bert(), OctavConfig())
    if not mode.startswith("autocast"):
        model.to(dtype)
    clips = []

    def watch(module: FakeQuantize, args: tuple, output: torch.Tensor) -> None:
        signed = module.is_signed(args[0])
        clips.append((module, args[0].detach(), signed, module.compute_clip(args[0])))

    for module in model.modules():
        if isinstance(module, FakeQuantize):
            module.register_forward_hook(watch)
    with torch.no_grad(), torch.autocast("cpu", dtype=dtype, enabled=mode.startswith("autocast")):
        model(**padded_batch)
    assert len(clips) > 2 * 13
    assert {x.dtype for _, x, _, _ in clips} >= {dtype}
    for module, x, signed, clip in clips:
        assert clip.dtype == torch.float32
        rows = x.double().flatten(1) if module.dim is not None else x.double().reshape(1, -1)
        for row, got in zip(rows, clip.flatten().tolist(), strict=True):
            assert got == pytest.approx(octav_clip_twin(row, module.num_bits, signed), rel=1e-4), module.name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_step_that_overflows_is_skipped_and_training_goes_on(
    small_bert: MakeBert, padded_batch: dict, dtype: torch.dtype
) -> None:
    model = apply_octav(small_bert(), OctavConfig()).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=1000)
    scales, weights, losses = [scaler.get_scale()], [model.qa_outputs.weight.detach().clone()], []
    for step in range(6):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=dtype):
            loss = model(**padded_batch, start_positions=torch.tensor([1, 2]), end_positions=torch.tensor([3, 4])).loss
        losses.append(loss.item())
        scaler.scale(loss * (torch.inf if step == 2 else 1)).backward()
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
        weights.append(model.qa_outputs.weight.detach().clone())
    moved = [not torch.equal(before, after) for before, after in itertools.pairwise(weights)]
    assert moved == [True, True, False, True, True, True]
    assert scales == [256.0] * 3 + [128.0] * 4
    assert all(map(math.isfinite, losses))
    for name, parameter in model.named_parameters():
        assert parameter.isfinite().all(), name


def test_a_scale_that_is_too_large_comes_down_by_itself(small_bert: MakeBert, padded_batch: dict) -> None:
    """Gradients overflow in float16 without manipulation; activations do not depend on the loss scale."""
    model = apply_octav(small_bert(), OctavConfig()).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    scales = []
    for _ in range(40):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            loss = model(**padded_batch, start_positions=torch.tensor([1, 2]), end_positions=torch.tensor([3, 4])).loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    assert scales[0] == 2.0**39
    assert scales[-1] == scales[-2] > 1, "it settles"
    assert not torch.equal(model.qa_outputs.weight, before["qa_outputs.weight"])
    assert all(p.isfinite().all() for p in model.parameters())


def test_an_overflowing_activation_names_its_module(small_bert: MakeBert, padded_batch: dict) -> None:
    model = apply_octav(small_bert(), OctavConfig()).train()
    model.bert.encoder.layer[0].intermediate.dense.bias.data.fill_(1e5)  # beyond float16's 65504
    message = r"^bert\.encoder\.layer\.0\.output\.dense input: .* Inf, .*float16 overflow"
    with torch.autocast("cpu", dtype=torch.float16), pytest.raises(ValueError, match=message):
        model(**padded_batch)
