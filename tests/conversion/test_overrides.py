"""An override that concerns nothing in the modules that its pattern matches is refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertForQuestionAnswering

from octav_hf import OctavConfig, apply_octav

MakeBert = Callable[..., BertForQuestionAnswering]

SELF = "bert.encoder.layer.0.attention.self"
WORDS = "bert.embeddings.word_embeddings"


@pytest.mark.parametrize(
    ("pattern", "field", "value", "operands"),
    [
        (f"{SELF}.query", "quantize_attention", False, "key, probabilities, query, value"),
        ("qa_outputs", "embedding_bits", 4, "embedding"),
        ("qa_outputs", "activation_granularity", {"key": "token"}, "key"),
        (WORDS, "weight_bits", 8, "weight"),
        (WORDS, "unsigned_activations", False, "input"),
        ("*.LayerNorm", "activation_clip", "max", "input, key, probabilities, query, value"),
    ],
)
def test_without_effect(small_bert: MakeBert, pattern: str, field: str, value: Any, operands: str) -> None:
    model, override = small_bert(), {"group_size": 32, field: value}
    classes = [type(module) for module in model.modules()]
    expected = re.escape(f"module_overrides[{pattern!r}] has no effect: group_size, {field} of") + f".* {operands} to"
    with pytest.raises(ValueError, match=expected):
        apply_octav(model, OctavConfig(module_overrides={pattern: override}))
    assert [type(module) for module in model.modules()] == classes


@pytest.mark.parametrize(
    ("pattern", "override"),
    [
        (SELF, {"quantize_attention": False, "weight_bits": 8}),  # the linear layers in it have the weights
        (WORDS, {"embedding_bits": 4, "weight_clip": "max"}),
        ("qa_outputs", {"activation_granularity": {"input": "token", "query": "token"}}),
        ("qa_outputs", {"weight_bits": None, "activation_bits": None, "quantize_attention": False}),
        ("bert", {"asymmetric_activations": True, "embedding_bits": 8}),
    ],
)
def test_with_effect(small_bert: MakeBert, pattern: str, override: dict[str, Any]) -> None:
    apply_octav(small_bert(), OctavConfig(module_overrides={pattern: override}))


def test_bits_of_none_leave_an_unknown_weight_in_float() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(2, 4, 4))

    override = {"weight_bits": None, "activation_bits": None}
    apply_octav(nn.Sequential(nn.Linear(4, 4), Experts()), OctavConfig(module_overrides={"1": override}))
