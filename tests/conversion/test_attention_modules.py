"""Attention modules are found by class, by the functions they call, or by the config; no other modules are."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from octav_hf import OctavConfig, apply_octav, check_coverage, coverage_report
from octav_hf.conversion.attention_modules import attention_modules
from octav_hf.nn import ATTENTION_OPERANDS

Tensor = torch.Tensor


class Projections(nn.Module):
    """The layers of single-head attention over the second last dimension."""

    def __init__(self, **inner: nn.Module) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(8, 8) for _ in range(3))
        for name, module in inner.items():
            self.add_module(name, module)


def sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value)


class Mixer(Projections):
    """Attention with operators in a class with another name, which only the config can identify."""

    def forward(self, x: Tensor) -> Tensor:
        scores = self.query(x) @ self.key(x).mT
        return torch.softmax(scores, -1) @ self.value(x)


class SelfAttention(Projections):
    """Attention, identified by the class name."""

    def forward(self, x: Tensor) -> Tensor:
        return sdpa(self.query(x), self.key(x), self.value(x))


class NamedByItsBase(SelfAttention):
    """Attention, identified by a base class."""


NamedByItsBase.__name__ = "Block"


class InterfaceMixer(Projections):
    """Attention through Transformers' attention interface, under another name."""

    is_causal = False

    def forward(self, x: Tensor) -> Tensor:
        attend = ALL_ATTENTION_FUNCTIONS["sdpa"]
        heads = [layer(x).unsqueeze(-3) for layer in (self.query, self.key, self.value)]
        return attend(self, *heads, attention_mask=None)[0].squeeze(-2)


class DecoratedInterfaceMixer(InterfaceMixer):
    """The same, with a decorated forward."""

    @functools.wraps(InterfaceMixer.forward)
    def forward(self, *args: Tensor) -> Tensor:
        return super().forward(*args)


class Router(nn.Module):
    """A softmax over experts, whose weights are only linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.expert = nn.Linear(8, 2), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.gate(x).softmax(-1)[..., :1] * self.expert(x)


class Matcher(nn.Module):
    """Part of a loss: softmax and matmul, without parameters."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.matmul(x.softmax(-1), x.mT)


class AttentionMask(nn.Module):
    """A helper with Attention in its class name, without submodules."""


class ScoringModel(Projections):
    """A whole model with a matmul and a softmax of its own around attention."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.matmul(self.inner(x).softmax(-1), x.mT)


FOUND = [SelfAttention, NamedByItsBase, InterfaceMixer, DecoratedInterfaceMixer]


def names_of(model: nn.Module, patterns: list[str] | None = None) -> list[str]:
    return list(attention_modules(dict(model.named_modules()), patterns))


@pytest.mark.parametrize("attention", FOUND)
def test_attention_is_found_and_quantized(attention: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"router": Router(), "matcher": Matcher(), "mask": AttentionMask(), "layer": attention()})
    assert names_of(model) == ["layer"]
    apply_octav(model, OctavConfig())
    assert names_of(model) == ["layer"]
    model["layer"](torch.randn(2, 3, 8))  # raises where an operand was not quantized


@pytest.mark.parametrize("other", [Router, Matcher, AttentionMask, nn.Linear])
def test_other_modules_are_not_taken_for_attention(other: type[nn.Module]) -> None:
    assert names_of(nn.Sequential(other(2, 2) if other is nn.Linear else other())) == []


def test_only_the_innermost_is_attention() -> None:
    class WrappingAttention(Projections):
        pass

    model = ScoringModel(
        inner=WrappingAttention(inner=InterfaceMixer()), other=WrappingAttention(inner=SelfAttention())
    )
    assert names_of(model) == ["inner.inner", "other.inner"]


def test_attention_that_calls_the_interface_contains_a_helper_called_attention() -> None:
    class AttentionDropout(nn.Sequential):
        pass

    model = nn.Sequential(InterfaceMixer(helper=AttentionDropout(nn.Dropout())))
    assert names_of(model) == ["0"]


def test_the_config_names_attention_that_cannot_be_found() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(Mixer(), SelfAttention()), torch.randn(2, 3, 8)
    float_operands = check_coverage(apply_octav(copy.deepcopy(model), OctavConfig()), x)
    assert {row.module for row in float_operands} == {"0"}

    apply_octav(model, OctavConfig(attention_modules=["0", "1"]))
    assert check_coverage(model, x) == []
    kinds = [(row.module, row.operand) for row in coverage_report(model) if row.kind == "attention"]
    assert kinds == [(name, operand) for name in "01" for operand in ATTENTION_OPERANDS]


def test_what_the_config_names_replaces_what_would_be_found() -> None:
    model = apply_octav(nn.Sequential(Mixer(), SelfAttention()), OctavConfig(attention_modules=["0"]))
    assert {row.module for row in coverage_report(model) if row.kind == "attention"} == {"0"}
    around = nn.Sequential(model, SelfAttention())
    assert {row.module for row in coverage_report(around) if row.kind == "attention"} == {"0.0", "1"}


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("0.query", r"attention_modules: '0\.query' is a Linear, which has no attention matmuls"),
        ("1*", r"attention_modules: '1' contains '1\.query', which is listed too"),
        ("2", "attention_modules: '2' matches no module of Sequential"),
    ],
)
def test_what_is_no_attention_is_refused(pattern: str, message: str) -> None:
    model = nn.Sequential(Mixer(), Mixer(inner=Mixer()))
    with pytest.raises(ValueError, match=message):
        apply_octav(model, OctavConfig(attention_modules=[pattern]))
    assert type(model[0]) is Mixer
