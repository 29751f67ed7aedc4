"""Embedding tables of whole models: positions, tied heads, resized vocabularies, checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForMaskedLM, AutoModelForQuestionAnswering, BertConfig, BertForMaskedLM

from octav_hf import OctavConfig, apply_octav, coverage_report, remove_octav
from octav_hf.functional import fake_quantize, octav_clip
from octav_hf.nn import QuantizedEmbedding

MakeBert = Callable[..., nn.Module]


def masked_lm(tied: bool = True) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    return BertForMaskedLM(BertConfig(vocab_size=50, tie_word_embeddings=tied, **sizes)).eval()


def logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


def test_all_tables_are_quantized_and_reported(small_bert: MakeBert, padded_batch: dict) -> None:
    model = apply_octav(small_bert(), OctavConfig(embedding_bits=6))
    report = coverage_report(model)
    assert not report.left_in_float()
    rows = {row.module: row for row in report if row.kind == "embedding"}
    assert set(rows) == {f"bert.embeddings.{name}_embeddings" for name in ("word", "position", "token_type")}
    for row in rows.values():
        assert (row.operand, row.bits, row.clip_cell, row.gradient_estimator) == (
            "weight",
            6,
            "octav per channel",
            "mad",
        )
    outputs = []
    for name in ("word", "position"):
        table = model.get_submodule(f"bert.embeddings.{name}_embeddings")
        table.register_forward_hook(lambda module, args, output: outputs.append((module, args[0], output)))
    model(**padded_batch)
    assert len(outputs) == 2
    for table, ids, output in outputs:
        expected = fake_quantize(table.weight, octav_clip(table.weight, 6, dim=1), 6)
        assert torch.equal(output, nn.functional.embedding(ids, expected))
        assert not torch.equal(output, nn.functional.embedding(ids, table.weight))


def test_one_table_can_differ_or_stay_in_float(small_bert: MakeBert) -> None:
    config = OctavConfig(
        embedding_bits=4,
        module_overrides={
            "bert.embeddings.word_embeddings": {"embedding_bits": 8, "weight_clip": "max"},
            "bert.embeddings.position_embeddings": {"embedding_bits": None},
        },
        exclude_modules=["bert.embeddings.token_type_embeddings"],
    )
    rows = {row.module: row for row in coverage_report(apply_octav(small_bert(), config)) if row.kind == "embedding"}
    assert (rows["bert.embeddings.word_embeddings"].bits, rows["bert.embeddings.word_embeddings"].clip) == (8, "max")
    assert rows["bert.embeddings.position_embeddings"].reason == "embedding_bits is None"
    assert rows["bert.embeddings.token_type_embeddings"].reason.startswith("excluded by")


def test_only_embeddings(small_bert: MakeBert, padded_batch: dict) -> None:
    model = apply_octav(small_bert(), OctavConfig(weight_bits=None, activation_bits=None, embedding_bits=3))
    assert {row.kind for row in coverage_report(model) if row.bits} == {"embedding"}
    model(**padded_batch)


def test_a_tied_head_and_its_table_share_one_parameter_and_quantize_it_alike() -> None:
    model = apply_octav(masked_lm(), OctavConfig(weight_bits=4, embedding_bits=4))
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert head.weight is table.weight
    ids = torch.arange(50)
    assert torch.equal(table(ids), head.weight_quantizer(head.weight))

    model.train()
    model(ids[None], labels=ids[None]).loss.backward()
    assert table.weight.grad.abs().sum(1).min() > 0
    before = table.weight.detach().clone()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert not torch.equal(table.weight, before)
    assert torch.equal(table(ids), head.weight_quantizer(head.weight))


@pytest.mark.parametrize("tied", [True, False])
def test_a_resized_vocabulary_stays_quantized(tied: bool) -> None:
    model = apply_octav(masked_lm(tied), OctavConfig(embedding_bits=4))
    model.resize_token_embeddings(60)
    table = model.get_input_embeddings()
    assert isinstance(table, QuantizedEmbedding)
    ids = torch.arange(60)
    assert model(ids[None]).logits.shape == (1, 60, 60)
    assert torch.equal(table(ids), fake_quantize(table.weight, octav_clip(table.weight, 4, dim=1), 4))
    model.tie_weights()
    assert (model.get_output_embeddings().weight is table.weight) is tied


def test_saved_loaded_and_removed(tmp_path: Path) -> None:
    ids = torch.arange(50)[None]
    before = logits(masked_lm(), ids)
    model = apply_octav(masked_lm(), OctavConfig(embedding_bits=4))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert torch.equal(logits(loaded, ids), logits(model, ids))
    assert not torch.equal(logits(model, ids), logits(apply_octav(masked_lm(), OctavConfig()), ids))
    assert torch.equal(logits(remove_octav(model), ids), before)
    assert type(model.get_input_embeddings()) is nn.Embedding


def test_from_pretrained_equals_apply_octav(small_bert: MakeBert, padded_batch: dict, tmp_path: Path) -> None:
    small_bert().save_pretrained(tmp_path)
    config = OctavConfig(embedding_bits=5)
    loaded = AutoModelForQuestionAnswering.from_pretrained(tmp_path, quantization_config=config)
    with torch.no_grad():
        expected = apply_octav(small_bert(), config)(**padded_batch).start_logits
        assert torch.equal(loaded(**padded_batch).start_logits, expected)
