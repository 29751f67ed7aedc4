"""Memory for the backward pass of a training step, as small as with signs and offsets on the host."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import BertForQuestionAnswering

from octav_hf import OctavConfig, apply_octav
from octav_hf.nn import FakeQuantize

MakeBert = Callable[..., BertForQuestionAnswering]


def kept_bytes(run: Callable[[], Tensor], model: nn.Module) -> int:
    """The size of all tensors that ``run`` saves for its backward pass, parameters left out, each memory once."""
    sizes: dict[int, int] = {}
    alive: list[Tensor] = []
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
            alive.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        run().backward()
    return sum(sizes.values())


# Measured at the last version in which the host read signs and offsets.
RECIPES = {"float": (None, 178_600), "paper": (OctavConfig(), 267_696), "accurate": (OctavConfig.accurate(), 267_696)}


@pytest.mark.parametrize(("config", "expected"), RECIPES.values(), ids=RECIPES.keys())
def test_of_bert(
    small_bert: MakeBert, padded_batch: dict[str, Tensor], config: OctavConfig | None, expected: int
) -> None:
    model = small_bert().train()
    if config is not None:
        apply_octav(model, config)
    labels = {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 4])}
    signs = 4 * sum(isinstance(module, FakeQuantize) for module in model.modules())  # a number each
    torch.manual_seed(0)
    assert kept_bytes(lambda: model(**padded_batch, **labels).loss, model) <= expected + signs


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("gradient", "per_element"), [("ste", 0), ("pwl", 1), ("mad", None)])
def test_of_a_quantizer(gradient: str, per_element: int | None, dtype: torch.dtype, asymmetric: bool) -> None:
    """Nothing, a byte per element, or the existing operand; and a few numbers."""
    x = torch.randn(40, 50, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    quantizer = FakeQuantize(4, signed=None, asymmetric=asymmetric, gradient_estimator=gradient)
    kept = kept_bytes(lambda: quantizer(x).sum(), quantizer)
    assert kept <= x.numel() * (x.element_size() if per_element is None else per_element) + 16
