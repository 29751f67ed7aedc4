"""Saved files describe the modules of the saved model, whatever ``apply_octav`` was called on."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModel,
    BertConfig,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertLMHeadModel,
    BertModel,
    EncoderDecoderModel,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    T5Config,
    T5ForConditionalGeneration,
    modeling_utils,
)

from octav_hf import (
    OctavConfig,
    apply_octav,
    calibrate_octav,
    coverage_report,
    pack_octav,
    remove_octav,
    unpack_octav,
)
from octav_hf.nn import FakeQuantize, PackedLayer, QuantizedLayer, QuantizedLinear, SynchronizedFakeQuantize

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
IDS = torch.arange(5, 37).view(4, 8)


def bert_config(**fields: Any) -> BertConfig:
    return BertConfig(vocab_size=40, max_position_embeddings=16, **SIZES, **fields)


def classifier(config: BertConfig | None = None, seed: int = 0) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    return BertForSequenceClassification(config or bert_config()).eval()


def output(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS)[0]


def operands(model: nn.Module) -> list[tuple[Any, ...]]:
    """The rows of the coverage report without the reasons for what is in float, which a checkpoint does not have."""
    return [row.cells()[:-1] for row in coverage_report(model)]


def quantized(model: nn.Module) -> list[tuple[Any, ...]]:
    return [row for row in operands(model) if row[2] != "float"]


def assert_comes_back(model: Any, folder: Path) -> PreTrainedModel:
    model.save_pretrained(folder)
    loaded = type(model).from_pretrained(folder)
    assert operands(loaded) == operands(model)
    assert torch.equal(output(loaded), output(model))
    return loaded


class Wrapper(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.inner, self.gate = model, nn.Linear(2, 2)


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="eager")


@pytest.mark.parametrize("wrap", [compiled, nn.DataParallel, nn.Sequential, Wrapper])
@pytest.mark.parametrize("packed", [False, True], ids=["training form", "packed"])
def test_a_model_inside_the_one_that_was_quantized(
    wrap: Callable[..., nn.Module], packed: bool, tmp_path: Path
) -> None:
    model = classifier()
    wrapped = apply_octav(wrap(model), OctavConfig(weight_bits=3, exclude_modules=["*classifier"]))
    if packed:
        pack_octav(wrapped)
    loaded = assert_comes_back(model, tmp_path)
    assert loaded.bert.encoder.layer[0].attention.self.query.weight_quantizer.num_bits == 3
    assert type(loaded.classifier) is nn.Linear


@pytest.mark.versions
@pytest.mark.parametrize("packed", [False, True], ids=["training form", "packed"])
def test_a_model_around_the_one_that_was_quantized(packed: bool, tmp_path: Path) -> None:
    model = classifier()
    config = OctavConfig(
        weight_bits=3, sync_activation_clips=True, module_overrides={"encoder.layer.1.*": {"weight_bits": 5}}
    )
    apply_octav(model.bert, config)
    if packed:
        pack_octav(model.bert)
    loaded = assert_comes_back(model, tmp_path / "whole")
    assert type(loaded.classifier) is nn.Linear
    assert loaded.bert.encoder.layer[1].output.dense.weight_quantizer.num_bits == 5
    assert isinstance(loaded.bert.pooler.dense.input_quantizer, SynchronizedFakeQuantize)
    part = assert_comes_back(model.bert, tmp_path / "part")
    assert isinstance(part.pooler.dense, PackedLayer) is packed


@pytest.mark.versions
@pytest.mark.parametrize("packed", [False, True], ids=["training form", "packed"])
def test_a_part_of_the_one_that_was_quantized(packed: bool, tmp_path: Path) -> None:
    model = apply_octav(classifier(), OctavConfig(module_overrides={"bert.encoder.layer.0": {"activation_bits": 6}}))
    if packed:
        pack_octav(model)
    loaded = assert_comes_back(model.bert, tmp_path)
    assert loaded.encoder.layer[0].attention.self.query.input_quantizer.num_bits == 6


@pytest.mark.versions
def test_two_quantized_models_in_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    decoder = BertLMHeadModel(bert_config(is_decoder=True, add_cross_attention=True))
    model = EncoderDecoderModel(encoder=BertModel(bert_config()), decoder=decoder)
    apply_octav(model.encoder, OctavConfig(weight_bits=3))
    apply_octav(model.decoder, OctavConfig(weight_bits=6, activation_bits=None, embedding_bits=8))
    model.save_pretrained(tmp_path)
    loaded = EncoderDecoderModel.from_pretrained(tmp_path)
    assert operands(loaded) == operands(model)
    with torch.no_grad():
        expected, actual = (m.eval()(input_ids=IDS, decoder_input_ids=IDS).logits for m in (model, loaded))
    assert torch.equal(actual, expected)


@pytest.mark.versions
def test_models_made_from_one_config_object(tmp_path: Path) -> None:
    config = bert_config()
    teacher = classifier(config)
    models = {bits: apply_octav(classifier(config), OctavConfig(bits, bits)) for bits in (4, 6, 8)}
    pack_octav(models[6])
    for bits, model in models.items():
        loaded = assert_comes_back(model, tmp_path / str(bits))
        # One made from the config of a quantized model that was loaded, or from its file, is a float model, too.
        for of_quantized in (loaded.config, BertConfig.from_pretrained(tmp_path / str(bits))):
            student, before = type(loaded)(of_quantized), copy.deepcopy(of_quantized.quantization_config)
            student.save_pretrained(tmp_path / "student")
            assert not isinstance(type(loaded).from_pretrained(tmp_path / "student").classifier, QuantizedLayer)
            assert of_quantized.quantization_config == before
        assert loaded.config.quantization_config.weight_bits == bits
    assert_comes_back(teacher, tmp_path / "teacher")
    assert not hasattr(config, "quantization_config")


def test_models_of_one_config_object_are_saved_at_the_same_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = bert_config()
    models = {bits: apply_octav(classifier(config), OctavConfig(bits, bits)) for bits in (4, 8)}
    begin_writing = modeling_utils.split_torch_state_dict_into_shards

    def other_first(*args: Any, **kwargs: Any) -> Any:
        monkeypatch.setattr(modeling_utils, "split_torch_state_dict_into_shards", begin_writing)
        assert not hasattr(config, "quantization_config")
        models[8].save_pretrained(tmp_path / "8")
        return begin_writing(*args, **kwargs)

    monkeypatch.setattr(modeling_utils, "split_torch_state_dict_into_shards", other_first)
    models[4].save_pretrained(tmp_path / "4")
    for bits, model in models.items():
        assert operands(type(model).from_pretrained(tmp_path / str(bits))) == operands(model)
        assert model.config is config


class NeedsMore(BertForSequenceClassification):
    def __init__(self, config: BertConfig, *, width: int):
        super().__init__(config)
        self.classifier = nn.Linear(16, width)


@pytest.mark.parametrize("packed", [False, True], ids=["training form", "packed"])
def test_a_class_that_takes_more_than_a_config(packed: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model = apply_octav(NeedsMore(bert_config(), width=5))
    if packed:
        pack_octav(model)
    with caplog.at_level("WARNING", "octav_hf"):
        model.save_pretrained(tmp_path)
    assert "NeedsMore takes more arguments than its config" in caplog.text
    assert torch.equal(output(NeedsMore.from_pretrained(tmp_path, width=5)), output(model))


class ReadsWeights(BertForSequenceClassification):
    def __init__(self, config: BertConfig):
        super().__init__(config)
        self.largest = self.classifier.weight.max().item()


def test_a_class_that_cannot_be_loaded(tmp_path: Path) -> None:
    model = apply_octav(ReadsWeights(bert_config()))
    with pytest.raises(ValueError, match=r"ReadsWeights cannot be saved, because loading it would fail: .*meta"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_a_state_dict_of_another_form_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    model = apply_octav(classifier())
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    frozen = calibrate_octav(copy.deepcopy(model), weights=True)
    packed = pack_octav(copy.deepcopy(model))
    for saved, state_dict, message in (
        (frozen, weights, r"clips of its weight are frozen, but the given state_dict has none"),
        (packed, weights, r"call octav_hf\.unpack_octav"),
        (model, packed.state_dict(), r"call octav_hf\.pack_octav"),
    ):
        with pytest.raises(ValueError, match=rf"bert\.encoder\.layer\.0\.attention\.self\.query: .*{message}"):
            saved.save_pretrained(tmp_path / "saved", state_dict=state_dict)
        assert not (tmp_path / "saved").exists()
    frozen.save_pretrained(tmp_path / "saved", state_dict=frozen.state_dict())


def test_a_part_with_a_tied_table_is_packed(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model: Any = BertForMaskedLM(bert_config())
    pack_octav(apply_octav(model.bert, OctavConfig(embedding_bits=4)))
    with pytest.raises(
        ValueError,
        match=r"word_embeddings: it is packed, but cls\.predictions\.decoder, which .* ties to its weight, is not",
    ):
        model.save_pretrained(tmp_path / "masked")
    assert not (tmp_path / "masked").exists()
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    model = T5ForConditionalGeneration(T5Config(vocab_size=40, decoder_start_token_id=0, **sizes)).eval()
    pack_octav(apply_octav(model.encoder, OctavConfig(embedding_bits=4)))
    model.save_pretrained(tmp_path / "t5")
    loaded = T5ForConditionalGeneration.from_pretrained(tmp_path / "t5")
    with torch.no_grad():
        expected, actual = (each(input_ids=IDS, decoder_input_ids=IDS).logits for each in (model, loaded))
    assert torch.equal(actual, expected)


def test_what_was_changed_by_hand(tmp_path: Path) -> None:
    model = apply_octav(classifier(), OctavConfig(exclude_modules=["bert.pooler"], embedding_bits=8))
    layers = model.bert.encoder.layer
    layers[0].attention.self.query.weight_quantizer.num_bits = 7
    layers[0].attention.self.key.input_quantizer = nn.Identity()
    layers[0].output.dense.weight_quantizer.dim = None
    layers[1].output.dense.input_quantizer = FakeQuantize(
        5, clip="max", signed=None, gradient_estimator="ste", dim=(-1,)
    )
    for operand in ("query", "key", "probabilities", "value"):
        layers[1].attention.self.get_submodule(f"{operand}_quantizer").num_bits = 6
    layers[1].intermediate.dense = nn.Linear(16, 24)
    model.bert.embeddings.token_type_embeddings = nn.Embedding(2, 16)
    layers[0].attention.self = classifier(seed=1).bert.encoder.layer[0].attention.self
    assert_comes_back(model, tmp_path / "first")
    # A module that was excluded and is quantized now contradicts the config that was asked for.
    model.bert.pooler = apply_octav(nn.Sequential(model.bert.pooler), OctavConfig(weight_bits=2))[0]
    assert_comes_back(model, tmp_path / "second")


def test_what_was_asked_for_stays_as_it_was_written(tmp_path: Path) -> None:
    config = OctavConfig(
        target_modules=["query", "dense"],
        exclude_modules=["*.layer.0.*"],
        module_overrides={"*.layer.1.output": {"weight_bits": 8}},
        attention_modules=["bert.encoder.layer.1.attention.self"],
    )
    assert_comes_back(apply_octav(classifier(), config), tmp_path)
    assert BertModel.config_class.from_pretrained(tmp_path).quantization_config == config.to_dict()


REFUSED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "a head of another kind": (
        lambda model: setattr(model, "classifier", nn.Sequential(nn.Dropout(), nn.Linear(16, 2))),
        r"classifier: the model's class has a Linear there",
    ),
    "a quantized head of another kind": (
        lambda model: setattr(model, "classifier", apply_octav(nn.Sequential(nn.Linear(16, 2)))),
        r"classifier: the model's class has a Linear there",
    ),
    "a layer that was added": (
        lambda model: model.add_module("extra", nn.Linear(16, 2)),
        r"extra: the model's class has no such module",
    ),
    "a layer that was left out": (
        lambda model: setattr(model.bert.encoder, "layer", model.bert.encoder.layer[:1]),
        r"bert\.encoder\.layer: it has 1 modules, but 2 according to the model's config; .*num_hidden_layers",
    ),
    "other labels than in the config": (
        lambda model: setattr(model, "classifier", nn.Linear(16, 5)),
        r"classifier: its weight has shape \(5, 16\), but \(2, 16\) according to the model's config; .*num_labels",
    ),
    "a quantizer of another class": (
        lambda model: setattr(model.classifier, "input_quantizer", nn.Dropout()),
        r"classifier: the quantizer of its input is a Dropout",
    ),
    "attention operands that differ": (
        lambda model: setattr(model.bert.encoder.layer[0].attention.self.key_quantizer, "num_bits", 8),
        r"layer\.0\.attention\.self: the quantizers of its attention operands differ",
    ),
    "a signed grid for probabilities": (
        lambda model: setattr(model.bert.encoder.layer[0].attention.self.probabilities_quantizer, "signed", True),
        r"layer\.0\.attention\.self: the quantizer of its probabilities .* would not be restored",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("packed", [False, True], ids=["training form", "packed"])
def test_what_would_not_come_back_is_refused_before_anything_is_written(
    case: str, packed: bool, tmp_path: Path
) -> None:
    change, message = REFUSED[case]
    model = apply_octav(classifier())
    if packed:
        pack_octav(model)
    change(model)
    config, quantizer = copy.deepcopy(model.config), model.hf_quantizer
    with pytest.raises(ValueError, match=message):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    assert model.config.to_dict() == config.to_dict()
    assert model.hf_quantizer is quantizer


def test_a_float_model_again(tmp_path: Path) -> None:
    loaded = assert_comes_back(apply_octav(classifier()), tmp_path / "quantized")
    assert_comes_back(remove_octav(loaded), tmp_path / "float")
    assert not isinstance(type(loaded).from_pretrained(tmp_path / "float").classifier, QuantizedLayer)


@pytest.mark.versions
@pytest.mark.parametrize(
    "config",
    [
        OctavConfig(exclude_modules=["classifier", "bert.encoder.layer.0"]),
        OctavConfig(exclude_modules=["bert.encoder.layer.0.attention.*"]),
        OctavConfig(module_overrides={"classifier": {"weight_bits": 8}, "bert.encoder.layer.1": {"weight_bits": 2}}),
        OctavConfig(target_modules=["bert.encoder.layer.1"]),
        OctavConfig(attention_modules=["bert.encoder.layer.1.attention.self"]),
        OctavConfig(exclude_modules=["bert"]),
        OctavConfig(target_modules=["bert"]),
        OctavConfig(
            module_overrides={"bert": {"weight_bits": 7}, "b*.dense": {"weight_gradient_estimator": "ste"}}
            | {"bert.pooler.dense": {"weight_gradient_estimator": "pwl"}}
        ),
        OctavConfig(attention_modules=["b*.layer.0.attention.self"], exclude_modules=["b*.layer.1", "*.pooler"]),
    ],
    ids=[
        *("exclude", "exclude by a pattern", "override", "target", "attention"),
        *("exclude the base", "target the base", "override the base", "patterns with the prefix"),
    ],
)
def test_names_are_found_with_and_without_the_prefix_of_the_base_model(config: OctavConfig, tmp_path: Path) -> None:
    model = apply_octav(classifier(), config)
    model.save_pretrained(tmp_path / "head")
    base = AutoModel.from_pretrained(tmp_path / "head")
    assert quantized(base) == quantized(model.bert)
    assert torch.equal(output(base), output(model.bert))
    other_head = BertForQuestionAnswering.from_pretrained(tmp_path / "head")
    assert quantized(other_head.bert) == [row for row in quantized(model.bert) if not row[0].startswith("pooler")]
    base.save_pretrained(tmp_path / "base")
    again = BertForSequenceClassification.from_pretrained(tmp_path / "base")
    assert quantized(again.bert) == quantized(base)
    assert torch.equal(output(again.bert), output(base))


def test_the_first_layer_is_found_without_the_last(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=3)
    apply_octav(ResNetForImageClassification(config), OctavConfig(first_last_bits=8)).save_pretrained(tmp_path)
    base = AutoModel.from_pretrained(tmp_path)
    assert base.embedder.embedder.convolution.weight_quantizer.num_bits == 8
    assert base.encoder.stages[0].layers[0].layer[0].convolution.weight_quantizer.num_bits == 4


@pytest.mark.versions
def test_a_head_that_is_new_is_quantized(tmp_path: Path) -> None:
    apply_octav(classifier()).save_pretrained(tmp_path)
    assert isinstance(BertForQuestionAnswering.from_pretrained(tmp_path).qa_outputs, QuantizedLinear)


def frozen(model: nn.Module) -> dict[str, bool]:
    return {name: m.weight_quantizer.is_frozen for name, m in model.named_modules() if isinstance(m, QuantizedLinear)}


@pytest.mark.versions
@pytest.mark.parametrize("packed", [False, True], ids=["training form", "packed"])
def test_clips_of_some_weights_are_frozen(packed: bool, tmp_path: Path) -> None:
    model = calibrate_octav(apply_octav(classifier()), weights=True)
    model.classifier.weight_quantizer.unfreeze()
    if packed:
        pack_octav(model)
    loaded = assert_comes_back(model, tmp_path)
    assert frozen(loaded) == frozen(model)
    assert not frozen(model)["classifier"]
    if packed:
        assert frozen(unpack_octav(loaded)) == frozen(model)


@pytest.mark.versions
def test_some_layers_are_packed(tmp_path: Path) -> None:
    model = pack_octav(apply_octav(classifier()))
    model.bert.encoder.layer[1] = apply_octav(classifier(seed=1), OctavConfig(weight_bits=6)).bert.encoder.layer[1]
    calibrate_octav(model, [IDS], progress_bar=False)
    loaded = assert_comes_back(model, tmp_path)
    assert isinstance(loaded.bert.encoder.layer[0].output.dense, PackedLayer)
    assert isinstance(loaded.bert.encoder.layer[1].output.dense.weight, nn.Parameter)


def test_a_table_that_is_one_module_by_several_names(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    model = T5ForConditionalGeneration(T5Config(vocab_size=40, decoder_start_token_id=0, **sizes)).eval()
    model.resize_token_embeddings(43, mean_resizing=False)
    assert model.decoder.embed_tokens is model.shared
    apply_octav(model, OctavConfig(embedding_bits=8, target_modules=["decoder"]))
    model.save_pretrained(tmp_path)
    loaded = T5ForConditionalGeneration.from_pretrained(tmp_path)
    with torch.no_grad():
        expected, actual = (m(input_ids=IDS, decoder_input_ids=IDS).logits for m in (model, loaded))
    assert torch.equal(actual, expected)
