"""``apply_octav`` and ``remove_octav``: conversion, what must not change, and refusals."""

import copy
import io
import logging
import pickle
from collections.abc import Callable

import pytest
import torch
from datasets.fingerprint import Hasher
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForQuestionAnswering,
    EncoderDecoderConfig,
    EncoderDecoderModel,
)

from octav_hf import (
    OctavConfig,
    apply_octav,
    calibrate_octav,
    check_coverage,
    coverage_report,
    pack_octav,
    remove_octav,
    uncalibrate_octav,
)
from octav_hf.conversion.record import recorded_config
from octav_hf.nn import FakeQuantize, QuantizedAttention, QuantizedLinear
from tests.question_answering import logits

MakeBert = Callable[..., BertForQuestionAnswering]


def test_bert_base_has_48_attention_operands_and_73_linear_layers() -> None:
    with torch.device("meta"):
        model = BertForQuestionAnswering(BertConfig())
    report = coverage_report(apply_octav(model, OctavConfig()))
    assert len(report.quantized("attention")) == 48
    assert len(report.quantized("linear")) == 2 * 73  # the paper counts the pooler, which this head does not have
    assert {row.operand for row in report.quantized("attention") if not row.signed} == {"probabilities"}


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_remove_gives_bit_identical_outputs(small_bert: MakeBert, padded_batch: dict, implementation: str) -> None:
    model = small_bert(attn_implementation=implementation)
    before = logits(model, padded_batch)
    assert not torch.equal(logits(apply_octav(model, OctavConfig()), padded_batch), before)
    assert remove_octav(model) is model
    assert torch.equal(logits(model, padded_batch), before)
    assert {type(module) for module in model.modules()} == {type(module) for module in small_bert().modules()}
    assert "quantization_config" not in model.config.to_dict()
    assert not model.is_quantized
    model.float()  # Transformers forbids this for a quantized model


def test_without_a_config_it_is_the_default_one(small_bert: MakeBert, padded_batch: dict) -> None:
    model, asked = apply_octav(small_bert()), apply_octav(small_bert(), OctavConfig())
    assert torch.equal(logits(model, padded_batch), logits(asked, padded_batch))
    assert recorded_config(model) == OctavConfig()


LAYER = "bert.encoder.layer.0"


@pytest.mark.parametrize(
    ("targets", "modules"),
    [
        (["query", "value"], {f"{LAYER[:-1]}{i}.attention.self.{name}" for i in (0, 1) for name in ("query", "value")}),
        (["qa_outputs"], {"qa_outputs"}),
        (["output.dense"], {f"{LAYER[:-1]}{i}.{part}output.dense" for i in (0, 1) for part in ("", "attention.")}),
        ([f"{LAYER}.attention.self"], {f"{LAYER}.attention.self{name}" for name in ("", ".query", ".key", ".value")}),
        (["*.1.attention.self.k*", "qa_outputs"], {f"{LAYER[:-1]}1.attention.self.key", "qa_outputs"}),
    ],
    ids=["last part", "full name", "last parts", "with what is below", "patterns"],
)
def test_only_target_modules_are_quantized(
    small_bert: MakeBert, padded_batch: dict, targets: list[str], modules: set[str]
) -> None:
    model = apply_octav(small_bert(), OctavConfig(target_modules=targets))
    report = coverage_report(model)
    assert {row.module for row in report if row.bits is not None} == modules
    assert {row.reason for row in report.left_in_float()} == {"not in target_modules"}
    assert not check_coverage(model, padded_batch).unexplained(report)


def test_what_is_excluded_is_no_target(small_bert: MakeBert) -> None:
    config = OctavConfig(target_modules=["query", "key"], exclude_modules=[LAYER])
    report = coverage_report(apply_octav(small_bert(), config))
    quantized = {row.module for row in report if row.bits is not None}
    assert quantized == {f"{LAYER[:-1]}1.attention.self.{name}" for name in ("query", "key")}
    reasons = {row.reason for row in report if row.module.endswith("0.attention.self.query")}
    assert reasons == {f"excluded by {LAYER!r}"}


def test_overrides_may_contradict_where_nothing_is_quantized(small_bert: MakeBert) -> None:
    overrides = {"qa*": {"weight_bits": 8}, "*outputs": {"weight_bits": 6}}
    for fields in ({"exclude_modules": ["qa_outputs"]}, {"target_modules": ["query"]}):
        model = apply_octav(small_bert(), OctavConfig(module_overrides=overrides, **fields))
        assert type(model.qa_outputs) is nn.Linear


def test_parameters_names_and_hooks_stay(small_bert: MakeBert, padded_batch: dict) -> None:
    model = small_bert()
    parameters = dict(model.named_parameters())
    modules = dict(model.named_modules())
    seen: list[str] = []
    model.qa_outputs.register_forward_hook(lambda *_: seen.append("linear"))
    model.bert.encoder.layer[0].attention.self.register_forward_hook(lambda *_: seen.append("attention"))

    apply_octav(model, OctavConfig())

    assert list(dict(model.named_parameters())) == list(parameters)
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert all(module is modules[name] for name, module in model.named_modules() if name in modules)
    assert set(model.state_dict()) == set(small_bert().state_dict())
    logits(model, padded_batch)
    assert sorted(seen) == ["attention", "linear"]


def test_an_optimizer_made_before_still_trains(small_bert: MakeBert, padded_batch: dict) -> None:
    model = small_bert().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    apply_octav(model, OctavConfig())
    before = model.bert.encoder.layer[0].attention.self.query.weight.clone()
    model(**padded_batch, start_positions=torch.tensor([1, 2]), end_positions=torch.tensor([3, 4])).loss.backward()
    optimizer.step()
    assert not torch.equal(model.bert.encoder.layer[0].attention.self.query.weight, before)


def test_applying_twice_is_refused(small_bert: MakeBert) -> None:
    model = apply_octav(small_bert(), OctavConfig())
    with pytest.raises(ValueError, match=r"already quantized.*remove_octav"):
        apply_octav(model, OctavConfig())
    with pytest.raises(ValueError, match="already quantized"):
        apply_octav(model.bert, OctavConfig())


def test_removing_from_a_float_model_is_refused(small_bert: MakeBert) -> None:
    with pytest.raises(ValueError, match="no module quantized"):
        remove_octav(small_bert())


def test_output_attentions_stay_available(small_bert: MakeBert, padded_batch: dict) -> None:
    model = apply_octav(small_bert(attn_implementation="eager"), OctavConfig())
    attentions = model(**padded_batch, output_attentions=True).attentions
    assert [attention.shape for attention in attentions] == [(2, 4, 16, 16)] * 2
    assert torch.allclose(attentions[0].sum(-1), torch.ones(()))


def test_eager_and_sdpa_agree(small_bert: MakeBert, padded_batch: dict) -> None:
    eager, sdpa = (apply_octav(small_bert(attn_implementation=name), OctavConfig()) for name in ("eager", "sdpa"))
    torch.testing.assert_close(logits(eager, padded_batch), logits(sdpa, padded_batch), rtol=0, atol=1e-6)


def test_switching_the_attention_implementation_keeps_it_quantized(small_bert: MakeBert, padded_batch: dict) -> None:
    model = apply_octav(small_bert(), OctavConfig())
    expected = logits(model, padded_batch)
    model.set_attn_implementation("eager")
    torch.testing.assert_close(logits(model, padded_batch), expected, rtol=0, atol=1e-6)


def test_padding_does_not_reach_real_tokens_through_the_mask(small_bert: MakeBert, padded_batch: dict) -> None:
    model = apply_octav(small_bert(), OctavConfig(activation_bits=None))
    ids = padded_batch["input_ids"].clone()
    ids[1, 10:] = 7
    changed = logits(model, {**padded_batch, "input_ids": ids})
    assert torch.equal(changed[:, :10], logits(model, padded_batch)[:, :10])


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_quantized_too(small_bert: MakeBert, padded_batch: dict, duplicate: Callable) -> None:
    model = apply_octav(small_bert(), OctavConfig())
    twin = duplicate(model)
    assert torch.equal(logits(twin, padded_batch), logits(model, padded_batch))
    assert torch.equal(logits(remove_octav(twin), padded_batch), logits(small_bert(), padded_batch))
    assert isinstance(model.bert.encoder.layer[0].attention.self, QuantizedAttention)


@pytest.mark.parametrize("form", ["dynamic", "frozen", "packed"])
def test_a_forward_pass_does_not_change_the_hash(small_bert: MakeBert, padded_batch: dict, form: str) -> None:
    """The hash with which ``datasets.map`` finds its cache."""
    model = apply_octav(small_bert(), OctavConfig.accurate(embedding_bits=8))
    if form != "dynamic":
        calibrate_octav(model, [padded_batch], progress_bar=False)
    if form == "packed":
        pack_octav(model)
    before = Hasher.hash(model)
    expected = logits(model, padded_batch)
    assert Hasher.hash(model) == before
    torch.save(model, file := io.BytesIO())
    file.seek(0)
    assert torch.equal(logits(torch.load(file, weights_only=False), padded_batch), expected)
    with torch.no_grad():
        model.qa_outputs.bias.add_(1)
    assert Hasher.hash(model) != before


def masked_lm(tied: bool) -> BertForMaskedLM:
    torch.manual_seed(0)
    return BertForMaskedLM(
        BertConfig(
            vocab_size=50,
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=64,
            tie_word_embeddings=tied,
        )
    ).eval()


@pytest.mark.parametrize("tied", [True, False])
def test_resized_token_embeddings_stay_quantized(tied: bool) -> None:
    model = apply_octav(masked_lm(tied), OctavConfig(module_overrides={"cls.predictions.decoder": {"weight_bits": 2}}))
    model.resize_token_embeddings(60)
    assert model(torch.arange(60)[None]).logits.shape == (1, 60, 60)
    head = model.get_output_embeddings()
    assert isinstance(head, QuantizedLinear)
    assert head.weight_quantizer.num_bits == 2
    assert (head.weight is model.get_input_embeddings().weight) is tied
    remove_octav(model)
    assert type(model.get_output_embeddings()) is nn.Linear
    assert not model._forward_pre_hooks


@pytest.mark.parametrize("duplicate", [None, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_resized_head_is_quantized_before_the_model_runs(duplicate: Callable | None) -> None:
    ids = torch.arange(50)[None]
    model = calibrate_octav(apply_octav(masked_lm(tied=False)), [ids], learned=True, progress_bar=False)
    if duplicate:
        model = duplicate(model)
    model.resize_token_embeddings(60)
    assert "cls.predictions.decoder.input_quantizer.clip_correction" in dict(model.named_parameters())  # for optimizers
    assert {row.module for row in coverage_report(model).left_in_float()} == {
        row.module for row in coverage_report(model) if row.kind == "embedding"
    }
    uncalibrate_octav(model)
    model.resize_token_embeddings(70)
    calibrate_octav(model, [ids], progress_bar=False)
    assert model.get_output_embeddings().input_quantizer.is_frozen
    remove_octav(model).resize_token_embeddings(80)
    assert type(model.get_output_embeddings()) is nn.Linear


def test_a_decoder_is_resized_on_its_own() -> None:
    """``EncoderDecoderModel`` refuses to resize, and asks for this."""
    configs = masked_lm(tied=False).config, masked_lm(tied=False).config
    model = EncoderDecoderModel(EncoderDecoderConfig.from_encoder_decoder_configs(*configs, tie_word_embeddings=False))
    apply_octav(model).decoder.resize_token_embeddings(60)
    assert isinstance(model.get_output_embeddings(), QuantizedLinear)
    remove_octav(model)
    assert not model.decoder._forward_pre_hooks


def test_only_inputs_without_negative_values_are_unsigned(small_bert: MakeBert, padded_batch: dict) -> None:
    """BERT has no unsigned inputs, so the option changes nothing; the second layer of an MLP with ReLU has one."""
    models = [apply_octav(small_bert(), OctavConfig(unsigned_activations=on)) for on in (True, False)]
    assert torch.equal(*(logits(model, padded_batch) for model in models))
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    for unsigned in (True, False):
        torch.manual_seed(0)
        net = apply_octav(
            nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4)), OctavConfig(unsigned_activations=unsigned)
        )
        hidden = net[:2](x)
        assert net[0].input_quantizer(x).unique().numel() <= 16
        assert net[0].input_quantizer(x).min() < 0
        # Of the signed grid's 16 levels 8 are not negative.
        assert (net[2].input_quantizer(hidden).unique().numel() > 8) is unsigned


def test_one_side_can_stay_in_float(small_bert: MakeBert) -> None:
    weights = apply_octav(small_bert(), OctavConfig(activation_bits=None))
    assert isinstance(weights.qa_outputs.weight_quantizer, FakeQuantize)
    assert not isinstance(weights.qa_outputs.input_quantizer, FakeQuantize)
    assert not coverage_report(weights).quantized("attention")
    activations = apply_octav(small_bert(), OctavConfig(weight_bits=None))
    assert not isinstance(activations.qa_outputs.weight_quantizer, FakeQuantize)
    assert isinstance(activations.qa_outputs.input_quantizer, FakeQuantize)


def test_overrides_and_exclusions_reach_their_modules(small_bert: MakeBert) -> None:
    config = OctavConfig(
        exclude_modules=["bert.encoder.layer.0.attention"],
        module_overrides={
            "qa_outputs": {"weight_bits": 8, "activation_bits": 6, "weight_clip": "max"},
            "bert.encoder.layer.1.attention.self": {"quantize_attention": False},
        },
    )
    model = apply_octav(small_bert(), config)
    assert model.qa_outputs.weight_quantizer.num_bits == 8
    assert model.qa_outputs.weight_quantizer.clip == "max"
    assert model.qa_outputs.input_quantizer.num_bits == 6
    first, second = (layer.attention for layer in model.bert.encoder.layer)
    assert type(first.self.query) is nn.Linear
    assert type(first.output.dense) is nn.Linear
    assert not isinstance(second.self, QuantizedAttention)
    assert isinstance(second.self.query, QuantizedLinear)


@pytest.mark.parametrize("field", ["exclude_modules", "module_overrides"])
def test_a_pattern_that_matches_nothing_is_refused(small_bert: MakeBert, field: str) -> None:
    value = ["qa_output"] if field == "exclude_modules" else {"qa_output": {"weight_bits": 8}}
    with pytest.raises(ValueError, match=f"{field}: 'qa_output' matches no module of BertForQuestionAnswering"):
        apply_octav(small_bert(), OctavConfig(**{field: value}))


def test_a_refused_model_is_unchanged(small_bert: MakeBert) -> None:
    model = small_bert()
    with pytest.raises(ValueError, match="matches no module"):
        apply_octav(model, OctavConfig(exclude_modules=["nowhere"]))
    assert {type(module) for module in model.modules()} == {type(module) for module in small_bert().modules()}
    assert not getattr(model, "is_quantized", False)
    assert getattr(model, "hf_quantizer", None) is None


def test_a_field_assigned_after_the_fact_is_checked(small_bert: MakeBert) -> None:
    config = OctavConfig()
    config.weight_bits = 12
    with pytest.raises(ValueError, match="integer from 2 to 8"):
        apply_octav(small_bert(), config)


class Net(nn.Module):
    def __init__(self, **layers: nn.Module):
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)


class WithAttentionFunction(nn.Linear):
    """Stands for any subclass that computes more than a linear map."""


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({"norm": nn.LayerNorm(2)}, "Net has no layer that can be quantized"),
        ({"special": WithAttentionFunction(4, 3)}, r"special: WithAttentionFunction with weight of shape \(3, 4\)"),
        ({"attention": nn.MultiheadAttention(8, 2)}, "attention: nn.MultiheadAttention fuses its matmuls"),
        (
            {"head": nn.Linear(2, 2), "layer": nn.TransformerEncoderLayer(8, 2)},
            r"layer: in evaluation, nn.TransformerEncoderLayer .* fused kernel.*'layer' to exclude_modules",
        ),
        (
            {"head": nn.Linear(2, 2), "conv": nn.Conv3d(2, 3, 1)},
            r"conv: Conv3d with weight of shape \(3, 2, 1, 1, 1\) is not a layer.*exclude_modules",
        ),
        (
            {"head": nn.Linear(2, 2), "rnn": nn.LSTM(4, 5)},
            r"rnn: LSTM with weight_ih_l0 of shape \(20, 4\) is not a layer.*exclude_modules",
        ),
    ],
    ids=["no layer", "subclass", "multihead attention", "fused layer", "unknown layer", "recurrent layer"],
)
def test_models_that_cannot_be_quantized_are_refused(layers: dict[str, nn.Module], message: str) -> None:
    config = OctavConfig(exclude_modules=["*.self_attn"]) if "layer" in layers else OctavConfig()
    with pytest.raises(ValueError, match=message):
        apply_octav(Net(**layers), config)


def test_an_unknown_layer_can_be_left_in_float() -> None:
    layers = {"head": nn.Linear(2, 2), "conv": nn.Conv3d(2, 3, 1), "rnn": nn.LSTM(4, 5), "norm": nn.LayerNorm((3, 4))}
    net = apply_octav(Net(**layers), OctavConfig(exclude_modules=["conv", "rnn"]))
    left = {(row.module, row.operand): row.reason for row in coverage_report(net).left_in_float()}
    assert left == {
        ("conv", "weight"): "excluded by 'conv'",
        ("rnn", "weight_ih_l0"): "excluded by 'rnn'",
        ("rnn", "weight_hh_l0"): "excluded by 'rnn'",
    }


@pytest.mark.parametrize("parameter", ["table", "my_weight"])
def test_the_models_own_parameter_can_be_left_in_float(parameter: str, caplog: pytest.LogCaptureFixture) -> None:
    net = Net(head=nn.Linear(2, 2))
    net.register_parameter(parameter, nn.Parameter(torch.zeros(5, 2)))
    caplog.set_level(logging.WARNING, "octav_hf")
    if parameter == "table":
        apply_octav(copy.deepcopy(net))
        assert "Net (table). coverage_report lists them; exclude_modules=['']" in caplog.text
        caplog.clear()
    else:
        with pytest.raises(ValueError, match=r"^Net with my_weight of shape \(5, 2\) .* add '' \(the model itself"):
            apply_octav(net)
    report = coverage_report(apply_octav(net, OctavConfig(exclude_modules=[""])))
    assert {row.operand: row.reason for row in report.left_in_float()} == {parameter: "excluded by ''"}
    assert isinstance(net.head, QuantizedLinear)
    assert not caplog.records


@pytest.mark.parametrize("model", [WithAttentionFunction(4, 3), nn.MultiheadAttention(8, 2), nn.Linear(4, 3)])
def test_a_message_about_the_model_itself_begins_with_its_class(model: nn.Module) -> None:
    model.forward = model.forward  # replaced on the instance
    with pytest.raises(
        ValueError, match=r"^(WithAttentionFunction|nn\.MultiheadAttention|the forward of this Linear) "
    ):
        apply_octav(model)


def test_advice_about_the_model_itself_needs_no_name() -> None:
    with pytest.raises(ValueError, match=r"^the weight of Embedding .* write weight_granularity='channel'$"):
        apply_octav(nn.Embedding(4, 3), OctavConfig(embedding_bits=4, weight_granularity="tensor"))


@pytest.mark.parametrize("field", ["target_modules", "attention_modules", "module_overrides"])
def test_no_other_field_names_the_model_itself(field: str) -> None:
    value = {"": {"weight_bits": 8}} if field == "module_overrides" else [""]
    with pytest.raises(ValueError, match=f"{field}: '' matches no module of Net"):
        apply_octav(Net(head=nn.Linear(2, 2)), OctavConfig(**{field: value}))


def test_everything_excluded_is_refused() -> None:
    with pytest.raises(ValueError, match="leaves every layer"):
        apply_octav(Net(one=nn.Linear(2, 2)), OctavConfig(exclude_modules=["one"]))


def test_a_plain_module_is_quantized_and_restored() -> None:
    net = apply_octav(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), OctavConfig())
    assert [type(layer) for layer in net] == [QuantizedLinear, nn.ReLU, QuantizedLinear]
    assert [type(layer) for layer in remove_octav(net)] == [nn.Linear, nn.ReLU, nn.Linear]


def test_quantizers_are_in_the_mode_of_their_module(small_bert: MakeBert) -> None:
    for training in (True, False):
        model = apply_octav(small_bert().train(training), OctavConfig())
        assert {module.training for module in model.modules()} == {training}


def test_a_replaced_forward_is_refused() -> None:
    net = nn.Sequential(nn.Linear(2, 2))
    net[0].forward = lambda x: x
    with pytest.raises(ValueError, match="0: the forward of this Linear has been replaced"):
        apply_octav(net, OctavConfig())


@pytest.mark.parametrize("implementation", ["flash_attention_2", "flex_attention"])
def test_a_kernel_that_hides_the_matmuls_is_refused(small_bert: MakeBert, implementation: str) -> None:
    model = small_bert()
    model.config._attn_implementation_internal = implementation
    with pytest.raises(ValueError, match=rf"bert.encoder.layer.0.attention.self: .*{implementation}.*sdpa"):
        apply_octav(model, OctavConfig())
    apply_octav(model, OctavConfig(quantize_attention=False))


def test_attention_that_cannot_be_found_is_refused(small_bert: MakeBert) -> None:
    model = small_bert()
    for layer in model.bert.encoder.layer:
        layer.attention = Net(inner=nn.Linear(32, 32))
    with pytest.raises(ValueError, match="4 attention heads, but no module"):
        apply_octav(model, OctavConfig())
    apply_octav(model, OctavConfig(quantize_attention=False))


@pytest.mark.parametrize(("model", "config"), [(None, OctavConfig()), (nn.Linear(2, 2), {"weight_bits": 4})])
def test_wrong_types_are_refused(model: object, config: object) -> None:
    with pytest.raises(TypeError, match="apply_octav takes"):
        apply_octav(model, config)


def test_a_nan_names_the_module(small_bert: MakeBert, padded_batch: dict) -> None:
    model = apply_octav(small_bert(), OctavConfig())
    with torch.no_grad():
        model.bert.encoder.layer[1].output.dense.weight[3, 5] = torch.nan
    with pytest.raises(ValueError, match=r"bert.encoder.layer.1.output.dense weight: .*\(32, 64\).* 1 NaN"):
        model(**padded_batch)
