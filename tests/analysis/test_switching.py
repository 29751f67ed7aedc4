"""Turning quantizers off: the outputs are those of a model that was converted without these modules."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import BertForQuestionAnswering

from octav_hf import OctavConfig, apply_octav, convert_octav, pack_octav
from octav_hf.analysis.switching import in_float
from octav_hf.conversion.modules import operand_quantizers
from tests.question_answering import logits

MakeBert = Callable[..., BertForQuestionAnswering]
ATTENTION, LINEAR = "bert.encoder.layer.0.attention.self", "bert.encoder.layer.1.intermediate.dense"
EMBEDDING = "bert.embeddings.word_embeddings"


@pytest.mark.parametrize(
    ("modules", "overrides"),
    [
        ([ATTENTION], {ATTENTION: {"quantize_attention": False}}),
        ([LINEAR], {LINEAR: {"weight_bits": None, "activation_bits": None}}),
        ([EMBEDDING], {EMBEDDING: {"embedding_bits": None}}),
        ([], {}),
    ],
    ids=["attention", "linear", "embedding", "none"],
)
def test_the_outputs_are_those_without_these_modules(
    small_bert: MakeBert,
    padded_batch: dict[str, torch.Tensor],
    modules: list[str],
    overrides: dict[str, Any],
) -> None:
    model = apply_octav(small_bert(), OctavConfig(embedding_bits=4))
    before, text = logits(model, padded_batch), str(model)
    expected = apply_octav(small_bert(), OctavConfig(embedding_bits=4, module_overrides=overrides))
    with in_float(model, [quantizer for name, _, quantizer in operand_quantizers(model) if name in modules]):
        assert torch.equal(logits(model, padded_batch), logits(expected, padded_batch))
    assert torch.equal(logits(model, padded_batch), before)
    assert str(model) == text
    assert bool(modules) is not torch.equal(logits(expected, padded_batch), before)


def test_all_modules_make_the_float_model_and_an_error_inside_puts_them_back(
    small_bert: MakeBert, padded_batch: dict[str, torch.Tensor]
) -> None:
    model = apply_octav(small_bert(), OctavConfig())
    before = logits(model, padded_batch)
    with in_float(model):  # attention is computed step by step, so that rounding may differ
        torch.testing.assert_close(logits(model, padded_batch), logits(small_bert(), padded_batch))
    with pytest.raises(ValueError, match="input_ids"), in_float(model):
        model()
    assert torch.equal(logits(model, padded_batch), before)


def test_what_cannot_be_turned_off_is_refused(small_bert: MakeBert) -> None:
    model = apply_octav(small_bert(), OctavConfig())
    packed = pack_octav(copy.deepcopy(model))
    with pytest.raises(ValueError, match="is packed, and its float weights"), in_float(packed):
        pass
    with pytest.raises(ValueError, match="convert_octav"), in_float(convert_octav(model)):
        pass
