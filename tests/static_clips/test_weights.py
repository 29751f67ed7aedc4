"""Frozen clips of weights: their values, training, both checkpoint forms, and refusals."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BertConfig, BertForMaskedLM, BertForQuestionAnswering, BertForSequenceClassification, BertModel

from octav_hf import (
    OctavConfig,
    apply_octav,
    calibrate_octav,
    coverage_report,
    model_card,
    pack_octav,
    remove_octav,
    uncalibrate_octav,
    unpack_octav,
)
from octav_hf.conversion.record import recorded_config
from octav_hf.nn import QuantizedLayer, WeightFakeQuantize
from tests import twins
from tests.frozen_activations import frozen_activations
from tests.question_answering import logits

MakeBert = Callable[..., BertForQuestionAnswering]
LAYER = "bert.encoder.layer.0.output.dense"
CLIPS = f"{LAYER}.weight_quantizer.clips"


def freeze(model: nn.Module) -> nn.Module:
    return calibrate_octav(model, weights=True)


def frozen_layers(model: nn.Module) -> dict[str, QuantizedLayer]:
    """Name -> layer whose weight has frozen clips, in training form."""
    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, QuantizedLayer)
        and isinstance(layer.weight_quantizer, WeightFakeQuantize)
        and layer.weight_quantizer.is_frozen
    }


@pytest.fixture
def frozen(small_bert: MakeBert) -> BertForQuestionAnswering:
    return freeze(apply_octav(small_bert(), OctavConfig()))


def train(model: nn.Module, batch: dict, steps: int = 3) -> None:
    """Training steps that are large enough to change every dynamic clip."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for _ in range(steps):
        optimizer.zero_grad()
        model(**batch).start_logits.square().mean().backward()
        optimizer.step()


def test_clips_are_those_of_the_weights(small_bert: MakeBert, padded_batch: dict) -> None:
    model = apply_octav(small_bert(), OctavConfig(module_overrides={"qa_outputs": {"weight_granularity": "tensor"}}))
    expected = logits(model, padded_batch)
    assert freeze(model) is model
    assert torch.equal(logits(model, padded_batch), expected)
    layers = frozen_layers(model)
    assert len(layers) == 13
    for name, layer in layers.items():
        clips = layer.weight_quantizer.clips
        rows = layer.weight.detach().double()
        if name == "qa_outputs":
            assert clips.shape == ()
            rows = rows.reshape(1, -1)
        else:
            assert clips.shape == (len(rows), 1)
        twin = torch.tensor([twins.octav_clip_twin(row, 4) for row in rows], dtype=torch.float64)
        torch.testing.assert_close(clips.double().reshape(-1), twin, rtol=1e-5, atol=0)


def test_training_leaves_the_clips_alone(frozen: BertForQuestionAnswering, padded_batch: dict) -> None:
    before = {name: tensor.clone() for name, tensor in frozen.state_dict().items()}
    train(frozen, padded_batch)
    after = frozen.state_dict()
    clips = {name for name in before if name.endswith(".clips")}
    assert len(clips) == 13
    assert all(torch.equal(before[name], after[name]) for name in clips)
    assert not torch.equal(before[f"{LAYER}.weight"], after[f"{LAYER}.weight"])
    layer = frozen_layers(frozen)[LAYER]
    levels = layer.weight_quantizer(layer.weight) / before[CLIPS] * 8
    torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-5)
    assert levels.min() == -8  # some weight has outgrown its clip


def test_gradient_of_a_clipped_weight_is_that_of_its_estimator(frozen: BertForQuestionAnswering) -> None:
    layer = frozen_layers(frozen)[LAYER]
    with torch.no_grad():
        layer.weight[0, 0] = 5 * layer.weight_quantizer.clips[0, 0]
    layer.weight_quantizer(layer.weight).sum().backward()
    torch.testing.assert_close(layer.weight.grad[0, 0], torch.tensor(0.2))  # MAD: clip / magnitude, Eq. 10


def test_unfrozen_clips_follow_the_weights(frozen: BertForQuestionAnswering, padded_batch: dict) -> None:
    train(frozen, padded_batch)
    held = logits(frozen, padded_batch)
    assert uncalibrate_octav(frozen) is frozen
    assert not recorded_config(frozen).frozen_weight_clips
    assert not any(name.endswith(".clips") for name in frozen.state_dict())
    followed = logits(frozen, padded_batch)
    assert not torch.equal(followed, held)
    fresh = apply_octav(BertForQuestionAnswering(frozen.config).eval(), OctavConfig())
    fresh.load_state_dict(frozen.state_dict())
    assert torch.equal(logits(fresh, padded_batch), followed)
    assert len(frozen_layers(freeze(frozen))) == 13


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_training_form_comes_back(small_bert: MakeBert, padded_batch: dict, tmp_path: Path, dtype: torch.dtype) -> None:
    model = freeze(apply_octav(small_bert(), OctavConfig())).to(dtype)
    assert frozen_layers(model)[LAYER].weight_quantizer.clips.dtype == torch.float32
    train(model, padded_batch)
    model.save_pretrained(tmp_path)
    loaded = BertForQuestionAnswering.from_pretrained(tmp_path, dtype=dtype)
    assert torch.equal(logits(loaded, padded_batch), logits(model, padded_batch))
    assert recorded_config(loaded).frozen_weight_clips
    assert frozen_layers(loaded)[LAYER].weight_quantizer.clips.dtype == torch.float32
    assert str(coverage_report(loaded)) == str(coverage_report(model))
    assert "per channel, frozen" in str(coverage_report(loaded))
    base = BertModel.from_pretrained(tmp_path, dtype=dtype, add_pooling_layer=False)  # without the prefix of the names
    expected = frozen_layers(model)[LAYER].weight_quantizer.clips
    assert torch.equal(base.encoder.layer[0].output.dense.weight_quantizer.clips, expected)


@pytest.mark.versions
def test_packed_form_has_them_and_gives_them_back(
    frozen: BertForQuestionAnswering, padded_batch: dict, tmp_path: Path
) -> None:
    train(frozen, padded_batch)
    expected, clips = logits(frozen, padded_batch), frozen_layers(frozen)[LAYER].weight_quantizer.clips
    pack_octav(frozen).save_pretrained(tmp_path)
    assert not any(name.endswith("clips") for name in load_file(tmp_path / "model.safetensors"))
    loaded = BertForQuestionAnswering.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, padded_batch), expected)
    for packed in (frozen, loaded):
        unpack_octav(packed)
        assert torch.equal(frozen_layers(packed)[LAYER].weight_quantizer.clips, clips)
        # the clips are the grid's own, so that unpacking changes nothing
        assert torch.equal(logits(packed, padded_batch), expected)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "own"])
def test_heads_and_embeddings(padded_batch: dict, tmp_path: Path, tied: bool, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    model = BertForMaskedLM(BertConfig(vocab_size=100, tie_word_embeddings=tied, **sizes)).eval()
    head, ids = "cls.predictions.decoder", padded_batch["input_ids"] % 60
    with caplog.at_level(logging.WARNING):
        freeze(apply_octav(model, OctavConfig(embedding_bits=8)))
    assert (f"share these weights, so their clips stay dynamic: {head}" in caplog.text) is tied
    assert (head in frozen_layers(model)) is not tied
    assert not model.bert.embeddings.word_embeddings.weight_quantizer.is_frozen
    model.resize_token_embeddings(60)
    model(input_ids=ids)
    if not tied:
        assert frozen_layers(model)[head].weight_quantizer.clips.shape == (60, 1)
    for form in ("training", "packed"):
        expected = model(input_ids=ids).logits
        model.save_pretrained(tmp_path / form)
        loaded = BertForMaskedLM.from_pretrained(tmp_path / form).eval()
        assert torch.equal(loaded(input_ids=ids).logits, expected)
        if form == "training":
            pack_octav(model)


def test_export_records_frozen_clips(frozen: BertForQuestionAnswering) -> None:
    layer = frozen_layers(frozen)[LAYER]
    layer.input_quantizer = nn.Identity()
    x = torch.randn(3, layer.in_features)
    exported = torch.export.export(layer, (x,)).module()
    assert torch.equal(exported(x), layer(x))


def test_float_model_comes_back(frozen: BertForQuestionAnswering) -> None:
    names = {name for name in frozen.state_dict() if not name.endswith(".clips")}
    remove_octav(frozen)
    assert set(frozen.state_dict()) == names
    assert not any(isinstance(module, QuantizedLayer) for module in frozen.modules())


def test_the_card_says_so(frozen: BertForQuestionAnswering) -> None:
    assert "clip `octav` per channel, frozen" in str(model_card(frozen))


@pytest.mark.versions
def test_files_without_a_clip_are_refused(frozen: BertForQuestionAnswering, tmp_path: Path) -> None:
    frozen.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    save_file({name: tensor for name, tensor in tensors.items() if name != CLIPS}, path, {"format": "pt"})
    with pytest.raises(ValueError, match=rf"{LAYER}: this checkpoint has no clips for its weight of shape \(32, 64\)"):
        BertForQuestionAnswering.from_pretrained(tmp_path)
    save_file(tensors, path, {"format": "pt"})
    other = BertForSequenceClassification.from_pretrained(tmp_path)  # whose head and pooler are not in the files
    assert frozen_layers(other).keys() - frozen_layers(frozen).keys() == {"classifier", "bert.pooler.dense"}
    assert not torch.equal(other.classifier.weight_quantizer(other.classifier.weight), torch.zeros(2, 32))


@pytest.mark.versions
def test_a_state_dict_brings_its_clips(frozen: BertForQuestionAnswering, padded_batch: dict, tmp_path: Path) -> None:
    frozen.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[CLIPS] = tensors[CLIPS] / 2  # which are not those of the weight
    frozen.load_state_dict(tensors)
    config = BertConfig.from_pretrained(tmp_path)
    loaded = BertForQuestionAnswering.from_pretrained(None, config=config, state_dict=tensors)
    assert torch.equal(logits(loaded.eval(), padded_batch), logits(frozen, padded_batch))
    assert frozen_layers(loaded).keys() == frozen_layers(frozen).keys()


@pytest.mark.versions
def test_a_pickled_checkpoint_brings_its_clips(
    frozen: BertForQuestionAnswering, padded_batch: dict, tmp_path: Path
) -> None:
    frozen.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(frozen.state_dict(), tmp_path / "pytorch_model.bin")
    loaded = BertForQuestionAnswering.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, padded_batch), logits(frozen, padded_batch))


def test_clips_of_another_shape_in_files_are_refused(frozen: BertForQuestionAnswering, tmp_path: Path) -> None:
    frozen.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    for wrong in (torch.ones(3, 1), -torch.ones(32, 1), torch.ones(32, 1, dtype=torch.int32)):
        save_file(tensors | {CLIPS: wrong}, path, {"format": "pt"})
        with pytest.raises(ValueError, match=rf"^{LAYER}.weight_quantizer: the frozen clips in this checkpoint"):
            BertForQuestionAnswering.from_pretrained(tmp_path)


@pytest.mark.versions
def test_clips_of_a_head_with_other_labels_are_those_of_the_new_weight(padded_batch: dict, tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    model = BertForSequenceClassification(BertConfig(vocab_size=100, **sizes))
    freeze(apply_octav(model)).save_pretrained(tmp_path)
    loaded = BertForSequenceClassification.from_pretrained(tmp_path, num_labels=5, ignore_mismatched_sizes=True)
    head = loaded.classifier
    assert frozen_layers(loaded).keys() == frozen_layers(model).keys()
    expected = torch.tensor([twins.octav_clip_twin(row, 4) for row in head.weight.detach()])
    torch.testing.assert_close(head.weight_quantizer.clips.flatten(), expected, rtol=1e-4, atol=0)


def test_the_field_is_refused_where_there_are_no_clips(small_bert: MakeBert, tmp_path: Path) -> None:
    small_bert().save_pretrained(tmp_path)
    field: dict = {"frozen_weight_clips": True}
    for config in (OctavConfig(**field), OctavConfig(module_overrides={"qa_outputs": field})):
        with pytest.raises(ValueError, match=r"is not for a float model; .*calibrate_octav\(model, weights=True\)"):
            apply_octav(small_bert(), config)
        with pytest.raises(ValueError, match="frozen_weight_clips=True is not for a float model"):
            BertForQuestionAnswering.from_pretrained(tmp_path, quantization_config=config)
    with pytest.raises(ValueError, match="frozen_weight_clips must be True or False, got 1"):
        OctavConfig(frozen_weight_clips=1)  # type: ignore[arg-type]


def test_what_cannot_be_frozen(small_bert: MakeBert, frozen: BertForQuestionAnswering) -> None:
    with pytest.raises(TypeError, match="calibrate_octav takes a model"):
        freeze(None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="has no module quantized by apply_octav"):
        freeze(small_bert())
    with pytest.raises(ValueError, match="nothing to freeze; pass batches .* weights=True"):
        calibrate_octav(frozen)
    with pytest.raises(ValueError, match="no quantized weight"):
        freeze(apply_octav(small_bert(), OctavConfig(weight_bits=None)))
    with pytest.raises(ValueError, match=r"query: its weight of shape \(32, 32\) is offloaded or has no values"):
        freeze(apply_octav(small_bert(), OctavConfig()).to("meta"))
    dynamic = apply_octav(small_bert(), OctavConfig())
    for model, asked in ((dynamic, {}), (frozen, {"weights": False})):
        with pytest.raises(ValueError, match="no clip of BertForQuestionAnswering is frozen"):
            uncalibrate_octav(model, **asked)


def test_packed_weights_keep_their_clips(frozen: BertForQuestionAnswering, padded_batch: dict) -> None:
    pack_octav(frozen)
    with pytest.raises(ValueError, match="is packed, including the clips of its weights; .*unpack_octav"):
        calibrate_octav(frozen, [padded_batch], weights=True, progress_bar=False)
    assert frozen_activations(frozen) == {}
    calibrate_octav(frozen, [padded_batch], progress_bar=False)
    assert len(frozen_activations(frozen)) == 13 + 2
    with pytest.raises(ValueError, match="is packed, including the frozen clips of its weights; .*weights=False"):
        uncalibrate_octav(frozen)
    assert len(frozen_activations(frozen)) == 13 + 2
    uncalibrate_octav(frozen, weights=False)
    assert frozen_activations(frozen) == {}


def test_frozen_under_inference_mode_for_training(small_bert: MakeBert, padded_batch: dict) -> None:
    model = apply_octav(small_bert(), OctavConfig())
    with torch.inference_mode():
        calibrate_octav(model, [padded_batch], weights=True, progress_bar=False)
        model.load_state_dict(model.state_dict())
    train(model, padded_batch, steps=1)


def test_frozen_again_at_the_present_weights(frozen: BertForQuestionAnswering, padded_batch: dict) -> None:
    before = frozen_layers(frozen)[LAYER].weight_quantizer.clips.clone()
    with torch.no_grad():
        for parameter in frozen.parameters():
            parameter.mul_(2)
    uncalibrated = uncalibrate_octav(copy.deepcopy(frozen))
    with pytest.raises(ValueError, match="got no batch"):
        calibrate_octav(frozen, [], weights=True)
    assert torch.equal(frozen_layers(frozen)[LAYER].weight_quantizer.clips, before)
    calibrate_octav(frozen, [padded_batch], weights=True, progress_bar=False)
    torch.testing.assert_close(frozen_layers(frozen)[LAYER].weight_quantizer.clips, 2 * before)
    calibrate_octav(uncalibrated, [padded_batch], progress_bar=False)
    assert frozen_activations(frozen) == frozen_activations(uncalibrated)
    uncalibrate_octav(frozen, activations=False)
    assert not frozen_layers(frozen)
    assert len(frozen_activations(frozen)) == 13 + 2


def test_nothing_is_frozen_after_an_error(small_bert: MakeBert) -> None:
    model = apply_octav(small_bert(), OctavConfig())
    with torch.no_grad():
        model.qa_outputs.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="qa_outputs weight"):
        freeze(model)
    assert not frozen_layers(model)
    assert not recorded_config(model).frozen_weight_clips


def test_config_json_stays_small(frozen: BertForQuestionAnswering, tmp_path: Path) -> None:
    """Clips of weights are stored as tensors: a BERT-Base has 83,000 of them."""
    frozen.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config["frozen_weight_clips"] is True
    assert "activation_clips" not in config


def test_a_weight_of_zeros_can_still_be_trained(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model = apply_octav(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)))
    with torch.no_grad():
        model[0].weight[3] = 0
        model[2].weight.zero_()
    calibrate_octav(model, weights=True)
    whole, rows = (record.getMessage() for record in caplog.records)
    assert whole == "These weights are all 0, so their clips are dynamic: 2"
    assert "rows or groups that are all 0" in rows
    assert "in training: 0. " in rows
    assert frozen_layers(model).keys() == {"0"}
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for _ in range(2):  # the first step moves the weight away from 0
        model(torch.ones(1, 8)).sum().backward()
        optimizer.step()
    assert model[2].weight_quantizer(model[2].weight).abs().max() > 0


def test_a_frozen_weight_that_became_zero_is_not_frozen_again() -> None:
    torch.manual_seed(0)
    model = apply_octav(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)))
    calibrate_octav(model, weights=True)
    with torch.no_grad():
        model[2].weight.zero_()
    calibrate_octav(model, weights=True)
    assert frozen_layers(model).keys() == {"0"}
