"""The recorded config describes the modules of a model, not the config given to ``apply_octav``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForMaskedLM, BertForQuestionAnswering, BertModel, ResNetForImageClassification

from octav_hf import (
    OctavConfig,
    apply_octav,
    calibrate_octav,
    coverage_report,
    pack_octav,
    uncalibrate_octav,
    unpack_octav,
)
from octav_hf.conversion.record import recorded_config
from octav_hf.nn import PackedLayer, QuantizedLinear
from tests.question_answering import logits

Step = Callable[[nn.Module], nn.Module]


def freeze_weights(model: nn.Module) -> nn.Module:
    return calibrate_octav(model, weights=True)


STEPS: dict[str, tuple[Step, Step, str]] = {
    "packed": (pack_octav, unpack_octav, "packed"),
    "frozen": (freeze_weights, uncalibrate_octav, "frozen_weight_clips"),
}


@pytest.mark.parametrize("step", STEPS)
def test_a_step_and_its_inverse(step: str) -> None:
    do, undo, field = STEPS[step]
    net = apply_octav(nn.Sequential(nn.Linear(4, 3)), OctavConfig(weight_bits=3))
    asked = recorded_config(net)
    assert not getattr(asked, field)
    assert getattr(recorded_config(do(net)), field)
    assert recorded_config(undo(net)) == asked == OctavConfig(weight_bits=3)


def test_frozen_clips_of_weights_survive_packing() -> None:
    net = freeze_weights(apply_octav(nn.Sequential(nn.Linear(4, 3))))
    clips = net[0].weight_quantizer.clips
    assert recorded_config(pack_octav(net)).frozen_weight_clips
    assert recorded_config(unpack_octav(net)).frozen_weight_clips
    torch.testing.assert_close(net[0].weight_quantizer.clips, clips)


def test_the_config_that_was_passed_is_neither_kept_nor_changed() -> None:
    config = OctavConfig(weight_bits=3)
    net = calibrate_octav(apply_octav(nn.Sequential(nn.Linear(4, 3)), config), [torch.randn(2, 4)], progress_bar=False)
    assert config == OctavConfig(weight_bits=3)
    config.weight_bits = 8
    assert recorded_config(net).weight_bits == 3


def test_a_layer_that_was_replaced_comes_back_as_what_runs(
    small_bert: Callable[..., BertForQuestionAnswering], padded_batch: dict, tmp_path: Path
) -> None:
    model = apply_octav(small_bert(), OctavConfig(module_overrides={"qa_outputs": {"weight_bits": 8}}))
    model.qa_outputs = nn.Linear(32, 2)
    calibrate_octav(model, [padded_batch], progress_bar=False)
    assert recorded_config(model).exclude_modules == ["qa_outputs"]
    model.save_pretrained(tmp_path)
    loaded = BertForQuestionAnswering.from_pretrained(tmp_path)
    assert type(loaded.qa_outputs) is nn.Linear
    assert torch.equal(logits(loaded, padded_batch), logits(model, padded_batch))


def test_attention_that_was_replaced_comes_back_in_float(
    small_bert: Callable[..., BertForQuestionAnswering], padded_batch: dict, tmp_path: Path
) -> None:
    model, name = apply_octav(small_bert()), "bert.encoder.layer.0.attention.self"
    model.bert.encoder.layer[0].attention.self = small_bert(seed=1).bert.encoder.layer[0].attention.self
    model.save_pretrained(tmp_path)
    loaded = BertForQuestionAnswering.from_pretrained(tmp_path)
    left = {row.module for row in coverage_report(loaded).left_in_float() if row.kind != "embedding"}
    assert left == {name, *(f"{name}.{layer}" for layer in ("query", "key", "value"))}
    assert torch.equal(logits(loaded, padded_batch), logits(model, padded_batch))


def test_a_replaced_layer_does_not_tie_the_checkpoint_to_its_class(
    small_bert: Callable[..., BertForQuestionAnswering], tmp_path: Path
) -> None:
    model = apply_octav(small_bert())
    model.qa_outputs = nn.Linear(32, 2)
    model.save_pretrained(tmp_path)
    encoder = BertModel.from_pretrained(tmp_path, add_pooling_layer=False)
    assert isinstance(encoder.encoder.layer[0].attention.self.query, QuantizedLinear)


def test_a_replaced_last_layer_has_no_first_last_bits(
    small_resnet: Callable[..., ResNetForImageClassification], tmp_path: Path
) -> None:
    model = apply_octav(small_resnet(), OctavConfig(first_last_bits=8))
    model.classifier[1] = nn.Linear(32, 5)
    model.save_pretrained(tmp_path)
    loaded = ResNetForImageClassification.from_pretrained(tmp_path)
    assert type(loaded.classifier[1]) is nn.Linear
    assert loaded.resnet.embedder.embedder.convolution.weight_quantizer.num_bits == 8


def test_a_packed_table_that_was_replaced(
    small_bert: Callable[..., BertForQuestionAnswering], padded_batch: dict, tmp_path: Path
) -> None:
    model = pack_octav(apply_octav(small_bert()), embedding_bits=8)
    model.set_input_embeddings(nn.Embedding(100, 32))
    model.save_pretrained(tmp_path)
    loaded = BertForQuestionAnswering.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, padded_batch), logits(model, padded_batch))


def test_a_config_given_to_from_pretrained_is_not_kept(
    small_bert: Callable[..., BertForQuestionAnswering], tmp_path: Path
) -> None:
    small_bert().save_pretrained(tmp_path / "float")
    config = OctavConfig(weight_bits=3)
    model = BertForQuestionAnswering.from_pretrained(tmp_path / "float", quantization_config=config)
    config.weight_bits = 8
    model.save_pretrained(tmp_path / "quantized")
    assert json.loads((tmp_path / "quantized/config.json").read_text())["quantization_config"]["weight_bits"] == 3


IDS = torch.arange(5, 21).view(2, 8)


def masked_lm() -> BertForMaskedLM:
    """A small calibrated model whose head is not tied to the embeddings."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    config = BertConfig(vocab_size=40, max_position_embeddings=16, tie_word_embeddings=False, **sizes)
    return calibrate_octav(apply_octav(BertForMaskedLM(config).eval()), [{"input_ids": IDS}], progress_bar=False)


@pytest.mark.versions
@pytest.mark.parametrize(
    ("before", "after"),
    [
        (None, None),
        (None, freeze_weights),
        (freeze_weights, None),
        (None, pack_octav),
        (pack_octav, None),
        (pack_octav, lambda model: model(input_ids=IDS)),
    ],
    ids=["saved", "then frozen", "frozen before", "then packed", "packed before", "packed before, then run"],
)
def test_a_head_that_was_resized_is_as_the_old_one(before: Step | None, after: Step | None, tmp_path: Path) -> None:
    model = masked_lm()
    clips = model.get_output_embeddings().input_quantizer.clips.clone()
    if before:
        before(model)
    model.resize_token_embeddings(48)
    if after:
        after(model)
    model.save_pretrained(tmp_path)
    loaded = BertForMaskedLM.from_pretrained(tmp_path)
    for head in (model.get_output_embeddings(), loaded.get_output_embeddings()):
        assert torch.equal(head.input_quantizer.clips, clips)
        assert isinstance(head, PackedLayer) is (pack_octav in (before, after))
        assert head.weight_quantizer.is_frozen is (freeze_weights in (before, after))
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_a_layer_that_was_added_is_recorded_as_it_is() -> None:
    net = apply_octav(nn.ModuleDict({"first": nn.Linear(4, 4), "last": nn.Linear(4, 4)}))
    net["added"] = nn.Linear(4, 2)
    del net["last"]
    assert recorded_config(net) == OctavConfig(exclude_modules=["added"])


def test_models_that_share_a_config_are_saved_as_what_they_are(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    shared = BertConfig(vocab_size=40, max_position_embeddings=16, **sizes)
    models = {bits: apply_octav(BertForQuestionAnswering(shared), OctavConfig(bits, bits)) for bits in (4, 6, 8)}
    pack_octav(models[6])
    for bits, model in models.items():
        model.save_pretrained(tmp_path / str(bits))
        written = json.loads((tmp_path / str(bits) / "config.json").read_text())["quantization_config"]
        assert (written["weight_bits"], written["packed"]) == (bits, bits == 6)
