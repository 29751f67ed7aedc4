"""Under autocast, and in a half-precision model, every matmul runs in the low precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertForQuestionAnswering, ResNetForImageClassification

from octav_hf import OctavConfig, apply_octav

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
