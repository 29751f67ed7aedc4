"""pack_octav and unpack_octav: equal outputs, and refusals or warnings for what cannot be packed."""

import copy
import logging
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import (
    BertForMaskedLM,
    BertForQuestionAnswering,
    ResNetForImageClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from octav_hf import (
    OctavConfig,
    apply_octav,
    check_coverage,
    coverage_report,
    pack_octav,
    remove_octav,
    unpack_octav,
)
from octav_hf.conversion.record import recorded_config
from octav_hf.nn import PackedLayer, PackedWeight, QuantizedLayer
from octav_hf.packing.pack import packed_layers
from tests.question_answering import logits

MakeBert = Callable[..., BertForQuestionAnswering]


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bits", range(2, 9))
def test_outputs_stay_the_same_bit_for_bit(
    small_bert: MakeBert, padded_batch: dict, bits: int, dtype: torch.dtype
) -> None:
    config = OctavConfig(weight_bits=bits, activation_bits=bits, embedding_bits=bits)
    model = apply_octav(small_bert().to(dtype), config)
    expected, report = logits(model, padded_batch), str(coverage_report(model))
    assert pack_octav(model) is model
    assert torch.equal(logits(model, padded_batch), expected)
    assert str(coverage_report(model)) == report
    assert len(packed_layers(model)) == 13 + 3
    assert {name.rpartition(".")[2] for name, _ in model.named_parameters()} <= {"weight", "bias", "guarded_weight"}
    assert all(parameter.dim() == 1 for parameter in model.parameters())
    check = check_coverage(model, padded_batch)
    assert check == [], str(check)


def test_overrides_and_exclusions_are_packed_as_they_are(small_bert: MakeBert, padded_batch: dict) -> None:
    config = OctavConfig(
        exclude_modules=["qa_outputs"],
        module_overrides={"*.query": {"weight_bits": 8}, "*.key": {"weight_bits": None}, "*.value": {"weight_bits": 3}},
    )
    model = apply_octav(small_bert(), config)
    expected = logits(model, padded_batch)
    packed = packed_layers(pack_octav(model))
    assert torch.equal(logits(model, padded_batch), expected)
    assert {layer.weight_quantizer.num_bits for layer in packed.values()} == {3, 4, 8}
    assert not any(name.endswith("key") or name == "qa_outputs" for name in packed)
    assert packed["bert.encoder.layer.0.attention.self.query"].weight_quantizer.packed_data.dtype == torch.int8


def test_the_config_says_packed_and_that_of_the_caller_stays_as_it_was(small_bert: MakeBert) -> None:
    config = OctavConfig(weight_bits=3)
    model = pack_octav(apply_octav(small_bert(), config))
    assert config.packed is False
    assert recorded_config(model).to_dict() == config.to_dict() | {"packed": True}
    assert recorded_config(unpack_octav(model)).to_dict() == config.to_dict()


def test_a_convolutional_model_outside_and_inside_transformers(
    small_resnet: Callable[..., ResNetForImageClassification],
) -> None:
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    model = apply_octav(small_resnet(), OctavConfig(first_last_bits=8))
    expected = model(images).logits
    assert torch.equal(pack_octav(model)(images).logits, expected)
    plain = apply_octav(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 30 * 30, 2)).eval(), OctavConfig()
    )
    expected = plain(images)
    assert torch.equal(pack_octav(plain)(images), expected)


def test_embeddings_are_packed_when_asked(small_bert: MakeBert, padded_batch: dict) -> None:
    model = pack_octav(apply_octav(small_bert(), OctavConfig()), embedding_bits=8)
    trained = apply_octav(small_bert(), OctavConfig(embedding_bits=8))
    assert torch.equal(logits(model, padded_batch), logits(trained, padded_batch))
    assert recorded_config(model).embedding_bits == 8
    words = model.bert.embeddings.word_embeddings
    assert isinstance(words, PackedLayer)
    assert words.weight_quantizer.packed_data.dtype == torch.int8


def test_contradicting_embedding_bits_are_refused(small_bert: MakeBert) -> None:
    model = apply_octav(small_bert(), OctavConfig(embedding_bits=8))
    with pytest.raises(ValueError, match=r"embedding_bits=4, but the model was trained with embedding_bits=8"):
        pack_octav(model, embedding_bits=4)
    with pytest.raises(ValueError, match="embedding_bits must be an integer from 2 to 8"):
        pack_octav(apply_octav(small_bert(), OctavConfig()), embedding_bits=9)


def masked_lm(small_bert: MakeBert) -> BertForMaskedLM:
    torch.manual_seed(0)
    return BertForMaskedLM(small_bert().config).eval()


def test_a_tied_head_stays_in_float_and_is_named(
    small_bert: MakeBert, padded_batch: dict, caplog: pytest.LogCaptureFixture
) -> None:
    model = apply_octav(masked_lm(small_bert), OctavConfig())
    expected = model(**padded_batch).logits
    with caplog.at_level(logging.WARNING):
        pack_octav(model)
    assert "cls.predictions.decoder" in caplog.text
    assert torch.equal(model(**padded_batch).logits, expected)
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
    assert isinstance(model.cls.predictions.transform.dense, PackedLayer)
    assert not isinstance(model.cls.predictions.decoder, PackedLayer)


def test_a_shared_table_cannot_be_packed(small_bert: MakeBert) -> None:
    model = apply_octav(masked_lm(small_bert), OctavConfig())
    before = str(model)
    with pytest.raises(ValueError, match=r"word_embeddings: other modules share this table of 100 rows"):
        pack_octav(model, embedding_bits=8)
    assert str(model) == before
    assert recorded_config(model).embedding_bits is None


def test_a_failure_changes_nothing(small_bert: MakeBert) -> None:
    model = apply_octav(small_bert(), OctavConfig())
    with torch.no_grad():
        model.qa_outputs.weight[0, 0] = torch.inf
    before, text = state_of(model), str(model)
    with pytest.raises(ValueError, match=r"qa_outputs weight: .*1 Inf"):
        pack_octav(model, embedding_bits=8)
    assert str(model) == text
    assert recorded_config(model).to_dict() == OctavConfig().to_dict()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_what_is_not_a_quantized_model_is_refused(small_bert: MakeBert) -> None:
    with pytest.raises(TypeError, match="takes a model"):
        pack_octav("bert")
    with pytest.raises(ValueError, match="has no module quantized by apply_octav"):
        pack_octav(small_bert())
    with pytest.raises(ValueError, match="no quantized weight that is not shared"):
        pack_octav(apply_octav(small_bert(), OctavConfig(weight_bits=None)))
    packed = pack_octav(apply_octav(small_bert(), OctavConfig()))
    with pytest.raises(ValueError, match="already packed"):
        pack_octav(packed)
    with pytest.raises(ValueError, match="is not packed"):
        unpack_octav(apply_octav(small_bert(), OctavConfig()))
    with pytest.raises(ValueError, match="packed=True is not for a float model"):
        apply_octav(small_bert(), OctavConfig(packed=True))


def test_a_model_that_reads_the_dtype_of_a_weight_dequantizes_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """T5 compares ``wo.weight.dtype`` with that of its input in every forward pass."""
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4}
    model = apply_octav(
        T5ForConditionalGeneration(T5Config(vocab_size=100, decoder_start_token_id=0, **sizes)).eval(), OctavConfig()
    )
    ids = torch.arange(5, 37).view(2, 16)
    expected = model(input_ids=ids, labels=ids).logits
    layers, calls = packed_layers(pack_octav(model)), []
    dequantize = PackedWeight.dequantize
    monkeypatch.setattr(PackedWeight, "dequantize", lambda self: calls.append(self.name) or dequantize(self))
    assert torch.equal(model(input_ids=ids, labels=ids).logits, expected)
    assert sorted(calls) == sorted(layer.weight_quantizer.name for layer in layers.values())


def trainable(model: nn.Module) -> dict[str, bool]:
    return {name: parameter.requires_grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("undo", [unpack_octav, remove_octav], ids=["unpack", "remove"])
def test_what_the_user_froze_stays_frozen(small_bert: MakeBert, undo: Callable[[nn.Module], nn.Module]) -> None:
    model = apply_octav(small_bert(), OctavConfig(embedding_bits=8))
    model.bert.embeddings.requires_grad_(False)
    model.qa_outputs.bias.requires_grad_(False)
    model.bert.encoder.layer[1].output.dense.weight.requires_grad_(False)
    before = trainable(model)
    packed = pickle.loads(pickle.dumps(copy.deepcopy(pack_octav(model)).to(torch.float64)))
    assert not any(trainable(packed).values())
    assert list(trainable(undo(packed)).items()) == list(before.items())
    assert trainable(undo(model)) == before


def test_after_loading_all_is_trainable(small_bert: MakeBert, tmp_path: Path) -> None:
    model = apply_octav(small_bert(), OctavConfig())
    model.requires_grad_(False)
    pack_octav(model).save_pretrained(tmp_path)
    assert not any(trainable(unpack_octav(model)).values())
    assert all(trainable(unpack_octav(BertForQuestionAnswering.from_pretrained(tmp_path))).values())


def test_a_packed_weight_cannot_be_made_trainable_with_what_is_around_it(small_bert: MakeBert, tmp_path: Path) -> None:
    model = pack_octav(apply_octav(small_bert(), OctavConfig()))
    model.save_pretrained(tmp_path)
    for other in (model, copy.deepcopy(model), BertForQuestionAnswering.from_pretrained(tmp_path)):
        for module in (other, other.bert.encoder.layer[0].attention, nn.ModuleList([nn.ReLU(), other.qa_outputs])):
            with pytest.raises(RuntimeError, match=r"weight: .* is packed and cannot be trained; .*unpack_octav"):
                module.requires_grad_(True)
    floats = dict(small_bert().named_parameters())
    assert model.num_parameters() == sum(value.numel() for name, value in floats.items() if name in model.state_dict())


def test_training_a_packed_model_is_refused_and_after_unpacking_it_trains(
    small_bert: MakeBert, padded_batch: dict
) -> None:
    model = pack_octav(apply_octav(small_bert(), OctavConfig())).train()
    with pytest.raises(RuntimeError, match=r"call octav_hf\.unpack_octav\(model\) before training"):
        model(**padded_batch)
    with torch.no_grad():
        model(**padded_batch)  # evaluation, with dropout
    packed = copy.deepcopy(model)
    assert unpack_octav(model) is model
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert set(model.state_dict()) == set(small_bert().state_dict())
    before = state_of(model)
    for name, layer in packed_layers(packed).items():
        assert torch.equal(before[f"{name}.weight"], layer.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(**padded_batch).start_logits.square().sum().backward()
    optimizer.step()
    assert not torch.equal(model.qa_outputs.weight, before["qa_outputs.weight"])
    assert all(isinstance(layer, QuantizedLayer) for layer in model.modules() if isinstance(layer, nn.Linear))
    pack_octav(model)


def test_adapters_on_a_packed_model_train(small_bert: MakeBert, padded_batch: dict) -> None:
    peft = pytest.importorskip("peft")
    base = pack_octav(apply_octav(small_bert(), OctavConfig()))
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["query"], init_lora_weights=False)).train()
    model(**padded_batch).start_logits.square().sum().backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained
    assert all("lora_" in name for name in trained)


def test_remove_octav_leaves_a_float_model_with_the_packed_values(small_bert: MakeBert, padded_batch: dict) -> None:
    model = pack_octav(apply_octav(small_bert(), OctavConfig(activation_bits=None)))
    expected = logits(model, padded_batch)
    removed = remove_octav(model)
    assert [type(module) for module in removed.modules()] == [type(module) for module in small_bert().modules()]
    assert [name for name, _ in removed.named_parameters()] == [name for name, _ in small_bert().named_parameters()]
    assert all(parameter.requires_grad for parameter in removed.parameters())
    assert torch.equal(logits(removed, padded_batch), expected)
    removed.train()(**padded_batch)


def test_weights_that_packing_cannot_take_are_named(small_bert: MakeBert) -> None:
    model = apply_octav(small_bert(), OctavConfig())
    nn.utils.parametrizations.weight_norm(model.qa_outputs)
    with pytest.raises(ValueError, match=r"is not a parameter|apply_octav"):
        pack_octav(model)
    with pytest.raises(
        ValueError, match=r"layer\.0\.attention\.self\.query: its weight of shape \(32, 32\) is offloaded"
    ):
        pack_octav(apply_octav(small_bert(), OctavConfig()).to("meta"))
