"""Attention modules are found by what their code does or what they are called, and nothing else is taken for one."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from octav_hf import OctavConfig, apply_octav
from octav_hf.conversion.attention_modules import attention_modules

Tensor = torch.Tensor


class Projections(nn.Module):
    """The layers of attention over the last but one dimension, with one head."""

    def __init__(self, **inner: nn.Module) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(8, 8) for _ in range(3))
        for name, module in inner.items():
            self.add_module(name, module)


class Mixer(Projections):
    """Attention by operators, under another name."""

    def forward(self, x: Tensor) -> Tensor:
        scores = self.query(x) @ self.key(x).mT
        return torch.softmax(scores, -1) @ self.value(x)


class MixerByMethods(Projections):
    """Attention spread over methods, with a softmax in an expression of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(self.query(x), self.key(x), self.value(x))

    def mix(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        normalize = lambda scores: scores.softmax(-1)  # noqa: E731
        return self.multiply(normalize(self.multiply(query, key.mT)), value)

    @staticmethod
    def multiply(left: Tensor, right: Tensor) -> Tensor:
        return torch.matmul(left, right)


def sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value)


class MixerByFunction(Projections):
    """Attention in a function of this file."""

    def forward(self, x: Tensor) -> Tensor:
        return sdpa(self.query(x), self.key(x), self.value(x))


class Derived(Mixer):
    """A class that changes nothing of the forward."""


class HiddenAttention(Projections):
    """Attention that is called from elsewhere, so that only its name tells."""

    def forward(self, x: Tensor) -> Tensor:
        return self.kernel(self.query(x), self.key(x), self.value(x))

    kernel = staticmethod(sdpa.__call__)


class NamedByItsBase(HiddenAttention):
    """Attention by what it derives from."""


class Router(nn.Module):
    """A softmax over experts, whose weights are only linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.expert = nn.Linear(8, 2), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.gate(x).softmax(-1)[..., :1] * self.expert(x)


class Matcher(nn.Module):
    """Part of a loss: a softmax and a matmul, without parameters."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.matmul(x.softmax(-1), x.mT)


class AttentionMask(nn.Module):
    """A helper that is called after attention and contains nothing."""


class ScoringModel(Projections):
    """A whole model with a matmul and a softmax of its own around attention."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.matmul(self.inner(x).softmax(-1), x.mT)


FOUND = [Mixer, MixerByMethods, MixerByFunction, Derived, HiddenAttention, NamedByItsBase]


@pytest.mark.parametrize("attention", FOUND)
def test_attention_is_found_and_quantized(attention: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"router": Router(), "matcher": Matcher(), "mask": AttentionMask(), "layer": attention()})
    assert [name for name, _ in attention_modules(model)] == ["layer"]
    apply_octav(model, OctavConfig())
    assert [name for name, _ in attention_modules(model)] == ["layer"]


@pytest.mark.parametrize("other", [Router, Matcher, AttentionMask, nn.Linear])
def test_other_modules_are_not_taken_for_attention(other: type[nn.Module]) -> None:
    assert list(attention_modules(nn.Sequential(other(2, 2) if other is nn.Linear else other()))) == []


def test_only_the_innermost_is_attention() -> None:
    class WrappingAttention(Projections):
        pass

    model = ScoringModel(inner=WrappingAttention(inner=Mixer()), other=WrappingAttention(inner=HiddenAttention()))
    assert [name for name, _ in attention_modules(model)] == ["inner.inner", "other.inner"]


def test_attention_by_its_code_contains_a_helper_called_attention() -> None:
    class AttentionDropout(nn.Sequential):
        pass

    model = nn.Sequential(Mixer(helper=AttentionDropout(nn.Dropout())))
    assert [name for name, _ in attention_modules(model)] == ["0"]
