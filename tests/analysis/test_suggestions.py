"""Suggested changes: measured on copies, sorted, and with code that makes the config that was measured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import BertForQuestionAnswering

from octav_hf import OctavConfig, apply_octav, calibrate_octav, pack_octav
from octav_hf.analysis.config_changes import changes, packed_bits, written
from octav_hf.analysis.divergence import FloatOutputs
from octav_hf.analysis.sensitivity import ModuleSensitivity, sensitivity
from octav_hf.analysis.suggestions import Suggestion, suggestions
from octav_hf.conversion.modules import operand_quantizers

from .test_operand_statistics import batches

MakeBert = Callable[..., BertForQuestionAnswering]
LINEAR = "bert.encoder.layer.0.output.dense"
ATTENTION = "bert.encoder.layer.0.attention.self"
EMBEDDING = "bert.embeddings.word_embeddings"
SENSITIVITIES = [ModuleSensitivity("qa_outputs", 0.1, 0.1), ModuleSensitivity(LINEAR, 0.3, 0.3)]


def config_of(suggestion: Suggestion, model: Any) -> OctavConfig:
    """What the code makes of a float model."""
    names: dict[str, Any] = {"model": model}
    exec(suggestion.code, names)
    assert names["model"].octav_config == names["config"]
    return names["config"]


@pytest.mark.parametrize("frozen", [False, True], ids=["dynamic", "frozen"])
def test_the_gain_is_that_of_a_model_quantized_by_the_code(small_bert: MakeBert, frozen: bool) -> None:
    model = apply_octav(small_bert(num_hidden_layers=1), OctavConfig(activation_bits=3))
    with torch.no_grad():  # outliers, as trained models have
        model.bert.embeddings.LayerNorm.weight[3] *= 20
    if frozen:
        calibrate_octav(model, batches(1))
    before, state = str(model), {name: x.clone() for name, x in model.state_dict().items()}
    found = suggestions(model, FloatOutputs(model, batches(1)), SENSITIVITIES)
    assert str(model) == before
    assert all(torch.equal(x, state[name]) for name, x in model.state_dict().items())
    assert 1 <= len(found) <= 3
    outputs = FloatOutputs(model, batches(1))
    for each in found:
        other = small_bert(num_hidden_layers=1)
        other.load_state_dict({name: x for name, x in state.items() if "quantizer" not in name})
        config_of(each, other)
        if frozen:
            calibrate_octav(other, batches(1))
        assert each.gain == pytest.approx(1 - outputs.divergence_of(other) / outputs.divergence_of(model), abs=1e-4)
        assert each.gain >= 0.02
        assert "KL divergence of the logits" in each.reason


def test_the_best_of_each_kind_comes_first_for_its_cost(small_bert: MakeBert, monkeypatch: pytest.MonkeyPatch) -> None:
    start = OctavConfig(group_size=32)
    left = {  # of the divergence, by what is asked; gains over prices: 0.85, 0.73 (bytes too), 0.48, 0.01
        ("mse", "mse", "channel", False): 0.5,
        ("mse", "mse", "channel", True): 0.1,
        ("octav", "mse", "channel", False): 0.49,
        ("mse", "mse", "group", True): 0.05,
    }

    def divergence_of(self: FloatOutputs, model: Any) -> float:
        config = model.octav_config
        fine = config.activation_granularity.get("value") == "channel" or config.weight_granularity == "group"
        key = (str(config.weight_clip), str(config.activation_clip), str(config.weight_granularity), fine)
        return 2 * left.get(key, 1 if model.octav_config == start else 0.99)

    monkeypatch.setattr(FloatOutputs, "divergence_of", divergence_of)
    model = apply_octav(small_bert(num_hidden_layers=1), start)
    found = suggestions(model, FloatOutputs(model, batches(1)), SENSITIVITIES)
    assert [each.gain for each in found] == pytest.approx([0.9, 0.95, 0.51])
    assert [config_of(each, small_bert(num_hidden_layers=1)) for each in found] == [
        OctavConfig.accurate(group_size=32),
        OctavConfig.groups(group_size=32),
        OctavConfig(activation_clip="mse", group_size=32),
    ]
    assert "2 before and 0.2 after" in found[0].reason
    assert "packed weights: +" in found[1].cost


def test_changes_differ_from_the_config_and_name_what_they_ask(small_bert: MakeBert) -> None:
    overrides = {"*.output.dense": {"activation_clip": "max"}, LINEAR: {"weight_clip": "max"}}
    for config in (
        OctavConfig(),
        OctavConfig(module_overrides=overrides),
        OctavConfig.accurate(),
        OctavConfig.groups(),
    ):
        model = apply_octav(small_bert(num_hidden_layers=1), config)
        found = list(changes(model, config, SENSITIVITIES))
        assert all(change.config != config for change in found)
        assert {change.asks for change in found} >= {"more bits"}
        more_bits = found[-1].config.module_overrides
        assert more_bits[LINEAR] == config.module_overrides.get(LINEAR, {}) | {"weight_bits": 8, "activation_bits": 8}
        if not config.module_overrides:
            assert list(more_bits) == [LINEAR]  # which has half of all sensitivity
        else:
            assert more_bits["*.output.dense"] == {"activation_clip": "max"}
    assert len(list(changes(model, OctavConfig(), []))) == 4 + 7 + 2


@pytest.mark.parametrize(
    ("config", "module", "bits"),
    [
        (OctavConfig(activation_bits=None), LINEAR, {"weight_bits": 8}),
        (OctavConfig(weight_bits=None), LINEAR, {"activation_bits": 8}),
        (OctavConfig(weight_bits=None), ATTENTION, {"activation_bits": 8}),
        (OctavConfig(activation_bits=8), ATTENTION, None),
        (OctavConfig(), ATTENTION, {"weight_bits": 8, "activation_bits": 8}),
        (OctavConfig(embedding_bits=4), EMBEDDING, {"embedding_bits": 8}),
        # Of two patterns for a module one cannot win; of a pattern and a full name the full name wins.
        (OctavConfig(module_overrides={"bert.*.self": {"activation_bits": 3}}), ATTENTION, None),
        (
            OctavConfig(module_overrides={"bert.*.output": {"activation_bits": 3}}),
            LINEAR,
            {"weight_bits": 8, "activation_bits": 8},
        ),
    ],
)
def test_more_bits_are_for_what_is_quantized(
    small_bert: MakeBert, config: OctavConfig, module: str, bits: dict[str, int] | None
) -> None:
    model = apply_octav(small_bert(num_hidden_layers=1), config)
    widths = {(name, operand): each.num_bits for name, operand, each in operand_quantizers(model)}
    found = [each.config for each in changes(model, config, [ModuleSensitivity(module, 1.0, 1.0)])]
    more = [each for each in found if each.module_overrides != config.module_overrides]
    assert [each.module_overrides for each in more] == (
        [] if bits is None else [config.module_overrides | {module: bits}]
    )
    for each in more:
        changed = apply_octav(small_bert(num_hidden_layers=1), each)
        expected = {
            (name, operand): 8 if name.startswith(module) else before for (name, operand), before in widths.items()
        }
        assert {(name, operand): each.num_bits for name, operand, each in operand_quantizers(changed)} == expected


def test_weights_may_be_in_float(small_bert: MakeBert) -> None:
    model = apply_octav(small_bert(num_hidden_layers=1), OctavConfig(weight_bits=None))
    found = suggestions(model, FloatOutputs(model, batches(1)), SENSITIVITIES)
    assert found
    assert not any("packed weights" in each.cost for each in found)  # they have no bytes to compare


@pytest.mark.parametrize(
    ("config", "begin"),
    [
        (OctavConfig(), "OctavConfig(\n    weight_bits=4,\n    activation_bits=4,\n)"),
        (OctavConfig.accurate(weight_bits=3), "OctavConfig.accurate(\n    weight_bits=3,\n    activation_bits=4,\n)"),
        (
            OctavConfig.groups(group_size=32),
            "OctavConfig.groups(\n    weight_bits=4,\n    activation_bits=4,\n    group_size=32",
        ),
        (OctavConfig(module_overrides={LINEAR: {"weight_gradient_estimator": "ste"}}), "OctavConfig(\n"),
    ],
)
def test_the_code_is_short_and_makes_the_config(small_bert: MakeBert, config: OctavConfig, begin: str) -> None:
    assert f"config = {begin}" in written(config)
    model = small_bert(num_hidden_layers=1)
    assert config_of(Suggestion("", "", 0.0, "", written(config)), model) == config


def test_bytes_are_those_of_the_packed_weights(small_bert: MakeBert) -> None:
    for config in (OctavConfig(embedding_bits=8), OctavConfig.groups(group_size=32)):
        model = apply_octav(small_bert(), config)
        bits = packed_bits(model)
        buffers = pack_octav(model).named_buffers()
        packed = [x for name, x in buffers if name.endswith(("weight_quantizer.packed_data", "weight_quantizer.scale"))]
        assert bits == 8 * sum(x.nbytes for x in packed)


def test_nothing_is_suggested_for_a_model_without_error(small_bert: MakeBert) -> None:
    model = apply_octav(small_bert(num_hidden_layers=1), OctavConfig(activation_bits=None, weight_bits=2))
    with torch.no_grad():
        for module in model.modules():
            if hasattr(module, "weight_quantizer"):
                module.weight.zero_()
    outputs = FloatOutputs(model, batches())
    assert suggestions(model, outputs, sensitivity(model, outputs)) == []
