"""The divergence from the float model, and each module's part in it, against float64 arithmetic."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn
from transformers import BertForQuestionAnswering, BertForSequenceClassification, BertModel

from octav_hf import OctavConfig, apply_octav, convert_octav, pack_octav
from octav_hf.analysis.divergence import FloatOutputs
from octav_hf.analysis.output_errors import output_errors
from octav_hf.analysis.sensitivity import sensitivity
from octav_hf.analysis.switching import in_float
from tests.architectures.models import ARCHITECTURES
from tests.training.test_distillation import segformer

from .test_operand_statistics import batches

Tensor = torch.Tensor
MakeBert = Callable[..., BertForQuestionAnswering]
CONFIG = OctavConfig(weight_bits=3, activation_bits=4)
ATTENTION, LINEAR = "bert.encoder.layer.0.attention.self", "bert.encoder.layer.0.output.dense"


def outputs_of(model: nn.Module) -> list[dict[str, np.ndarray]]:
    """The float tensors of the output by field, for each batch, in float64."""
    with torch.no_grad():
        return [{name: x.double().numpy() for name, x in model(**batch).items()} for batch in batches()]


def mean_kl(target: np.ndarray, output: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """``KL(target || output)`` of rows of logits, over the classes that are kept."""

    def log_softmax(x: np.ndarray) -> np.ndarray:
        x = np.where(kept, x, -np.inf)
        return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))

    p, q = log_softmax(target), log_softmax(output)
    return (np.where(kept, np.exp(p) * (np.where(kept, p, 0) - np.where(kept, q, 0)), 0)).sum(axis=-1)


def span_divergence(target: nn.Module, model: nn.Module) -> float:
    rows = []
    for batch, theirs, ours in zip(batches(), outputs_of(target), outputs_of(model), strict=True):
        kept = batch["attention_mask"].numpy()
        rows.append(np.mean([mean_kl(theirs[f], ours[f], kept) for f in ("start_logits", "end_logits")], axis=0))
    return float(np.concatenate(rows).mean())


def test_it_is_the_mean_kl_of_the_tokens_that_are_no_padding(small_bert: MakeBert) -> None:
    model, teacher = apply_octav(small_bert(), CONFIG), small_bert(seed=1)
    found = FloatOutputs(model, iter(batches()))
    assert found.divergence_of(model) == pytest.approx(span_divergence(small_bert(), model), rel=1e-4)
    assert found.measure == "KL divergence of the logits (nats)"
    with_teacher = FloatOutputs(model, batches(), teacher)
    assert with_teacher.divergence_of(model) == pytest.approx(span_divergence(teacher, model), rel=1e-4)
    with in_float(model):
        assert found.divergence_of(model) == 0


def test_a_model_without_logits_has_the_relative_squared_error(small_bert: MakeBert) -> None:
    for make in (BertModel, BertForSequenceClassification):
        torch.manual_seed(0)
        changes = {} if make is BertModel else {"num_labels": 1, "problem_type": "regression"}
        config = small_bert().config.__class__(**small_bert().config.to_dict() | changes)
        float_model = make(config).eval()
        model = apply_octav(copy.deepcopy(float_model), CONFIG)
        name, squares = "last_hidden_state" if make is BertModel else "logits", np.zeros(2)
        for batch, target, output in zip(batches(), outputs_of(float_model), outputs_of(model), strict=True):
            kept = batch["attention_mask"].numpy() if make is BertModel else np.ones(len(target[name]), dtype=bool)
            target, output = target[name][kept], output[name][kept]
            squares += np.square(output - target).sum(), np.square(target).sum()
        found = FloatOutputs(model, batches())
        assert found.divergence_of(model) == pytest.approx(squares[0] / squares[1], rel=1e-4)
        assert found.measure == "Relative squared error of the output"


def test_an_output_of_zeros_has_no_relative_error_alone() -> None:
    torch.manual_seed(0)
    float_model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU())
    model, zeros, others = apply_octav(copy.deepcopy(float_model), CONFIG), torch.zeros(2, 4), torch.randn(2, 4)
    both, alone = (FloatOutputs(model, each).divergence_of(model) for each in ([zeros, others], [others]))
    assert both == alone > 0
    with pytest.raises(ValueError, match="the outputs of the float model are all 0"):
        FloatOutputs(model, [zeros]).divergence_of(model)


@pytest.mark.parametrize("classes", [3, 1])
def test_segmentation_compares_the_classes_of_pixels(classes: int) -> None:
    """A single class has no alternative, so its logits have no KL divergence."""
    float_model, batch = segformer(0, num_labels=classes).eval(), {"pixel_values": torch.randn(1, 3, 32, 32)}
    model = apply_octav(copy.deepcopy(float_model), CONFIG)
    with torch.no_grad():
        target, output = (each(**batch).logits.movedim(1, -1).double().numpy() for each in (float_model, model))
    found = FloatOutputs(model, [batch])
    if classes == 1:
        expected = np.square(output - target).sum() / np.square(target).sum()
        assert found.measure == "Relative squared error of the output"
    else:
        expected = mean_kl(target, output, np.ones(classes, dtype=bool)).mean()
        assert found.measure == "KL divergence of the logits (nats)"
    assert found.divergence_of(model) == pytest.approx(expected, rel=1e-4)


def test_modules_alone_and_all_but_them(small_bert: MakeBert) -> None:
    model, teacher = apply_octav(small_bert(num_hidden_layers=1), CONFIG), small_bert(seed=1, num_hidden_layers=1)
    before = str(model)
    for other in (None, teacher):
        target = small_bert(num_hidden_layers=1) if other is None else other
        found = {each.module: each for each in sensitivity(model, FloatOutputs(model, batches(), other))}
        assert len(found) == 6 + 1 + 1
        drift = span_divergence(target, small_bert(num_hidden_layers=1))
        for name in (ATTENTION, LINEAR):
            alone = apply_octav(small_bert(num_hidden_layers=1), OctavConfig(**_fields(), module_overrides=_only(name)))
            all_but = apply_octav(
                small_bert(num_hidden_layers=1), OctavConfig(**_fields(), module_overrides=_without(name))
            )
            assert found[name].alone == pytest.approx(span_divergence(target, alone) - drift, rel=1e-3, abs=1e-7)
            expected = span_divergence(target, model) - span_divergence(target, all_but)
            assert found[name].all_but == pytest.approx(expected, rel=1e-3, abs=1e-7)
    assert str(model) == before


def _fields() -> dict[str, int]:
    return {"weight_bits": 3, "activation_bits": 4}


def _without(name: str) -> dict[str, dict[str, object]]:
    if name == ATTENTION:
        return {name: {"quantize_attention": False}}
    return {name: {"weight_bits": None, "activation_bits": None}}


def _only(name: str) -> dict[str, dict[str, object]]:
    off = {"weight_bits": None, "activation_bits": None, "quantize_attention": False}
    if name == ATTENTION:  # an override of attention holds for the layers in it too
        layers = [f"{ATTENTION}.{layer}" for layer in ("query", "key", "value")]
        others = [LINEAR, "bert.encoder.layer.0.intermediate", "bert.encoder.layer.0.attention.output", "qa_outputs"]
        return dict.fromkeys([*layers, *others], off)
    return dict.fromkeys(["bert.encoder.layer.0.attention", "bert.encoder.layer.0.intermediate", "qa_outputs"], off)


def module_outputs(model: nn.Module) -> dict[str, list[Tensor]]:
    found: dict[str, list[Tensor]] = {}
    handles = [
        module.register_forward_hook(
            lambda _, args, y, name=name: found.setdefault(name, []).append(y[0] if isinstance(y, tuple) else y)
        )
        for name, module in model.named_modules()
    ]
    outputs_of(model)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("form", ["own", "teacher", "packed"])
def test_errors_of_outputs_are_those_of_the_whole_model_so_far(small_bert: MakeBert, form: str) -> None:
    model = apply_octav(small_bert(num_hidden_layers=1), OctavConfig(embedding_bits=4))
    teacher = None if form == "own" else small_bert(num_hidden_layers=1, seed=int(form == "teacher"))
    if form == "packed":
        pack_octav(model)
    ours = module_outputs(model)
    theirs = module_outputs(small_bert(num_hidden_layers=1) if teacher is None else teacher)
    found = output_errors(model, batches(), teacher)
    assert [each.kind for each in found[:5]] == ["embedding"] * 3 + ["attention", "linear"]
    assert len(found) == 3 + 1 + 6 + 1
    for each in found:
        pairs = [(y.double(), f.double()) for y, f in zip(ours[each.module], theirs[each.module], strict=True)]
        noise = sum((y - f).square().sum() for y, f in pairs)
        assert each.sqnr_db == pytest.approx(
            float(10 * torch.log10(sum(f.square().sum() for _, f in pairs) / noise)), abs=1e-3
        )


@pytest.mark.parametrize("name", ["Albert (shared layers)", "DebertaV2", "ResNet", "T5"])
def test_architectures(name: str) -> None:
    architecture = ARCHITECTURES[name]
    model = apply_octav(architecture.make().eval(), OctavConfig())
    errors = output_errors(model, [architecture.batch()])
    assert all(each.sqnr_db is None or each.sqnr_db > -10 for each in errors)
    assert sum(each.sqnr_db is not None for each in errors) >= len(errors) - 1
    assert FloatOutputs(model, [architecture.batch()]).divergence_of(model) > 0


def test_what_cannot_be_compared_is_refused(small_bert: MakeBert) -> None:
    model = apply_octav(small_bert(num_hidden_layers=1), OctavConfig())
    with pytest.raises(ValueError, match=r"output_errors: the teacher, a Linear, has no module 'bert.encoder"):
        output_errors(model, batches(), nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"layer.0.attention.self.* returned tensors of shapes"):
        output_errors(model, batches(), small_bert(hidden_size=16, num_hidden_layers=1))
    with pytest.raises(ValueError, match="no module quantized"):
        FloatOutputs(small_bert(), batches())
    classifier = BertForSequenceClassification(small_bert().config).eval()
    with pytest.raises(ValueError, match="pass a teacher with the same head"):
        sensitivity(model, FloatOutputs(model, batches(), classifier))
    with pytest.raises(ValueError, match="FloatOutputs: the teacher.*is quantized"):
        FloatOutputs(model, batches(), copy.deepcopy(model))
    masked = small_bert(num_hidden_layers=1)
    with torch.no_grad():
        masked.qa_outputs.bias[1] = -torch.inf  # the difference of two is NaN
    with pytest.raises(ValueError, match=r"end_logits of the float BertFor.* \(1, 16\), holds NaN or Inf in batch 1"):
        FloatOutputs(model, batches(), masked)
    packed = pack_octav(copy.deepcopy(model))
    for function in (FloatOutputs, output_errors):
        with pytest.raises(ValueError, match="is packed, and its float weights"):
            function(packed, batches())
    with pytest.raises(ValueError, match="convert_octav"):
        output_errors(convert_octav(model), batches(), small_bert(num_hidden_layers=1))
