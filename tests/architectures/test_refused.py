"""Models that cannot be quantized completely are refused with the module's name and the setting with which they run."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import transformers as hf
from torch import nn

from octav_hf import OctavConfig, apply_octav, check_coverage, coverage_report

from .models import SIZES, VOCABULARY, text_batch

Tensor = torch.Tensor


def fused_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """A kernel called past torch.nn.functional."""
    heads = (x[:, None] for x in (query, key, value))
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*heads)[0][:, 0]


def three_operands(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return torch.einsum("bqd,bkd,bke->bqe", query, key, value).softmax(-1)


def no_softmax(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return (query @ key.mT).relu() @ value


def changed_probabilities(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return ((query @ key.mT).softmax(-1) - 0.1) @ value


def two_softmaxes(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Linear attention, where neither operand of the first matmul is the value."""
    return query.softmax(-1) @ (key.softmax(-2).mT @ value).softmax(-1)


class CustomAttention(nn.Module):
    """Single-head attention with a function given by the caller."""

    def __init__(self, attend: Callable[[Tensor, Tensor, Tensor], Tensor]):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(8, 8) for _ in range(3))
        self.attend = attend

    def forward(self, x: Tensor) -> Tensor:
        return self.attend(self.query(x), self.key(x), self.value(x))


class Model(nn.Module):
    """Custom attention between two layers."""

    def __init__(self, attend: Callable[[Tensor, Tensor, Tensor], Tensor]):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(8, 8)
        self.mixer = CustomAttention(attend)
        self.last = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.mixer(self.first(x)))


REMEDY = r"module_overrides=\{'mixer': \{'quantize_attention': False\}\}"


@pytest.mark.parametrize(
    ("attend", "error", "problem"),
    [
        (
            three_operands,
            NotImplementedError,
            "mixer: its attention multiplies with einsum 'bqd,bkd,bke->bqe', of 3 operands",
        ),
        (fused_attention, RuntimeError, "mixer: .* without a matmul on .* query, key, probabilities, value.*kernel"),
        (no_softmax, RuntimeError, "mixer: .* without a matmul on .* probabilities, value.*not come from a softmax"),
        (changed_probabilities, RuntimeError, "mixer: .* without a matmul on .* probabilities, value.*not recognized"),
        (
            two_softmaxes,
            NotImplementedError,
            "mixer: .*probabilities of shape .* with probabilities.*cannot be told apart",
        ),
    ],
)
def test_custom_attention(attend: Callable[..., Tensor], error: type[Exception], problem: str) -> None:
    x = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0))
    with pytest.raises(error, match=f"{problem}.*{REMEDY}"):
        apply_octav(Model(attend), OctavConfig())(x)
    with pytest.raises(
        error, match=f"^this .*{problem.removeprefix('mixer: ').removeprefix('its ')}.* quantize_attention=False"
    ):
        apply_octav(CustomAttention(attend), OctavConfig())(x)

    model = apply_octav(Model(attend), OctavConfig(module_overrides={"mixer": {"quantize_attention": False}}))
    check = check_coverage(model, x)
    assert {row.module for row in check} == {"mixer"}
    assert check.unexplained(coverage_report(model)) == []


def test_xlnet_multiplies_with_parameters_of_its_attention() -> None:
    config = hf.XLNetConfig(vocab_size=VOCABULARY, d_model=32, n_layer=1, n_head=4, d_inner=64)
    name = "transformer.layer.0.rel_attn"
    with pytest.raises(NotImplementedError, match=rf"{name}: .*its own parameter of shape \(32, 4, 8\).*'{name}'"):
        apply_octav(hf.XLNetForSequenceClassification(config), OctavConfig())(**text_batch())

    override = {"transformer.layer.0.rel_attn": {"quantize_attention": False}}
    model = apply_octav(hf.XLNetForSequenceClassification(config), OctavConfig(module_overrides=override))
    check = check_coverage(model, text_batch())
    assert {row.module for row in check} == {name}
    assert check.unexplained(coverage_report(model)) == []


def test_a_weight_multiplied_outside_its_layer_is_shown() -> None:
    """MobileBert's language-model head multiplies with the concatenated weights of two layers."""
    config = hf.MobileBertConfig(
        vocab_size=VOCABULARY, **SIZES | {"embedding_size": 16, "intra_bottleneck_size": 16, "num_hidden_layers": 1}
    )
    model = apply_octav(hf.MobileBertForMaskedLM(config).eval(), OctavConfig())
    batch = {name: value for name, value in text_batch().items() if name != "labels"}
    unexplained = check_coverage(model, batch).unexplained(coverage_report(model))
    assert {row.module for row in unexplained} == {"cls.predictions"}
    assert [row.parameter for row in unexplained] == [False, True]
