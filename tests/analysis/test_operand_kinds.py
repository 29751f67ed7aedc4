"""Kinds of operand: what belongs together, what it is called, and what it does to the outputs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertForQuestionAnswering

from octav_hf import OctavConfig, apply_octav, calibrate_octav, pack_octav, report
from octav_hf.analysis.divergence import FloatOutputs
from octav_hf.analysis.kind_names import kind_names
from octav_hf.analysis.operand_kinds import OperandKind, operand_kinds
from octav_hf.analysis.sensitivity import KindSensitivity, kind_sensitivity
from octav_hf.analysis.verdict import verdict
from octav_hf.conversion.modules import operand_quantizers
from tests.analysis.test_divergence import span_divergence
from tests.architectures.models import ARCHITECTURES

from .test_operand_statistics import batches

MakeBert = Callable[..., BertForQuestionAnswering]
LAYER = "bert.encoder.layer.*."
PROJECTIONS = tuple(f"{LAYER}attention.self.{name}" for name in ("query", "key", "value"))
NO_BITS: dict[str, Any] = {"weight_bits": None, "activation_bits": None}


def inputs(model: nn.Module, batch: Any = None) -> list[tuple[str, ...]]:
    found = operand_kinds(model, batches(1)[0] if batch is None else batch)
    return [kind.modules for kind in found if kind.operand == "input"]


def test_each_operand_of_bert_has_one_kind(small_bert: MakeBert) -> None:
    model = apply_octav(small_bert(), OctavConfig())
    kinds = operand_kinds(model, batches(1)[0])
    others = [f"{LAYER}{name}" for name in ("attention.output.dense", "intermediate.dense", "output.dense")]
    expected = [OperandKind((f"{LAYER}attention.self",), name) for name in ("query", "key", "probabilities", "value")]
    for name in (*PROJECTIONS, *others, "qa_outputs"):
        expected += [OperandKind((name,), operand) for operand in ("weight", "input")]
    shared = [OperandKind((name,), "input") for name in PROJECTIONS]
    assert set(kinds) == set(expected) - set(shared) | {OperandKind(PROJECTIONS, "input")}
    found = [id(quantizer) for quantizers in kinds.values() for quantizer in quantizers]
    assert sorted(found) == sorted(id(quantizer) for _, _, quantizer in operand_quantizers(model))
    assert len(kinds[OperandKind(PROJECTIONS, "input")]) == 6  # of two layers
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_inputs_that_are_quantized_otherwise_are_another_kind(small_bert: MakeBert) -> None:
    query, key, value = PROJECTIONS
    overrides = {"*.key": {"activation_clip": "max"}}
    model = apply_octav(small_bert(), OctavConfig(module_overrides=overrides))
    assert inputs(model)[:2] == [(query, value), (key,)]
    calibrate_octav(model, batches(1))
    assert inputs(model)[:2] == [(query, value), (key,)]
    calibrate_octav(model, batches(1), learned=True)  # clips that move apart in training
    assert inputs(model)[:3] == [(query,), (key,), (value,)]


def test_equal_values_in_two_tensors_are_two_kinds() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.a(x) + self.b(x.clone()) + self.c(x)

    model = apply_octav(Twice(), OctavConfig())
    assert inputs(model, torch.ones(2, 4)) == [("a", "c"), ("b",)]


def test_layers_of_encoder_and_decoder() -> None:
    architecture = ARCHITECTURES["T5"]
    found = inputs(apply_octav(architecture.make().eval(), OctavConfig()), architecture.batch())
    decoder = "decoder.block.*.layer.*."
    assert found[0][:2] == ("encoder.block.*.layer.*.SelfAttention.q", "encoder.block.*.layer.*.SelfAttention.k")
    assert (f"{decoder}EncDecAttention.q",) in found
    assert (f"{decoder}EncDecAttention.k", f"{decoder}EncDecAttention.v") in found


def test_alone_and_all_but_are_those_of_models_quantized_so(small_bert: MakeBert) -> None:
    widths = {"weight_bits": 3, "activation_bits": 4}
    teacher = small_bert(num_hidden_layers=1, seed=1)

    def divergence(**fields: Any) -> float:
        model = apply_octav(small_bert(num_hidden_layers=1), OctavConfig(**widths | fields))
        return span_divergence(teacher, model)

    drift, everything = span_divergence(teacher, small_bert(num_hidden_layers=1)), divergence()
    others = dict.fromkeys(("*.output.dense", "*.intermediate.dense", "qa_outputs"), NO_BITS)
    expected = {
        (PROJECTIONS, "input"): (
            divergence(weight_bits=None, quantize_attention=False, module_overrides=others),
            divergence(module_overrides={name: {"activation_bits": None} for name in ("*.query", "*.key", "*.value")}),
        ),
        ((f"{LAYER}output.dense",), "input"): (
            divergence(
                weight_bits=None,
                quantize_attention=False,
                module_overrides=dict.fromkeys(("*.attention", "*.intermediate", "qa_outputs"), NO_BITS),
            ),
            divergence(module_overrides={"bert.encoder.layer.0.output.dense": {"activation_bits": None}}),
        ),
    }
    model = apply_octav(small_bert(num_hidden_layers=1), OctavConfig(**widths))
    found = kind_sensitivity(model, FloatOutputs(model, batches(), teacher))
    assert [each.alone for each in found] == sorted((each.alone for each in found), reverse=True)
    measured = {(each.modules, each.operand): (each.alone, each.all_but) for each in found}
    assert len(measured) == len(found) == 4 + 7 + 5
    for kind, (alone, all_but) in expected.items():
        assert measured[kind] == pytest.approx((alone - drift, everything - all_but), rel=1e-3, abs=1e-7)


def made(*modules: str, operand: str = "input", alone: float = 0.0) -> KindSensitivity:
    return KindSensitivity(modules, operand, alone, 0.0)


def test_names() -> None:
    kinds = [
        made("encoder.*.q", "encoder.*.k", "encoder.*.v"),
        made("decoder.*.cross.k", "decoder.*.cross.v"),
        made("encoder.*.mlp.down"),
        made("decoder.*.mlp.down"),
        made("a.*.mlp.up", "b.*.attention.q"),
        made("a.*.attention", operand="query"),
        made("a.*.attention", operand="probabilities"),
        made("head", operand="weight"),
    ]
    assert kind_names(kinds, {"encoder.1.mlp.down": "GELU", "head": "ReLU"}) == [
        "inputs of q, k and v",
        "inputs of cross.k and v",
        "outputs of GELU (inputs of encoder.*.mlp.down)",
        "inputs of decoder.*.mlp.down",
        "inputs of mlp.up and attention.q",
        "queries of attention",
        "probabilities of attention",
        "weights of head",
    ]


def test_the_verdict_names_three_kinds_that_change_the_outputs() -> None:
    kinds = [made("a.*.x", alone=1.234), made("a.*.y", alone=0.5), made("a.*.z", alone=0.0123), made("b", alone=0.01)]
    assert verdict(kinds, {"a.0.y": "GELU"}, 1.5, [], []) == (
        "Quantization changes the outputs most in the inputs of x, the outputs of GELU (inputs of y) and the inputs of "
        "z: by 1.2, 0.5 and 0.012 when quantized alone, and by 1.5 when all operands are quantized."
    )
    assert verdict([*kinds[:1], made("b", alone=-1.0)], {}, 1.5, [], []) == (
        "Quantization changes the outputs most in the inputs of x: by 1.2 when quantized alone, and by 1.5 when all "
        "operands are quantized."
    )
    assert verdict([made("b")], {}, 0.0, [], []) == (
        "No kind of operand changes the outputs when it is quantized alone."
    )


def test_the_verdict_of_a_packed_model_names_the_operand_with_the_lowest_ratio(
    small_bert: MakeBert, tmp_path: Path
) -> None:
    overrides = {"qa_outputs": {"activation_bits": 2}}
    model = apply_octav(small_bert(num_hidden_layers=1), OctavConfig(activation_bits=8, module_overrides=overrides))
    found = report(pack_octav(model), batches(1), path=tmp_path / "report.html")
    (ratio,) = (each.sqnr_db for each in found.statistics if (each.module, each.operand) == ("qa_outputs", "input"))
    assert found.verdict == (f"The operand with the lowest signal-to-noise ratio is qa_outputs input ({ratio:.1f} dB).")
