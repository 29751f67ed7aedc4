"""Groups in whole models: config, reports, checkpoints, and refusals where they are not supported."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import BertForQuestionAnswering, GPT2Config, GPT2LMHeadModel, ResNetForImageClassification

from octav_hf import (
    OctavConfig,
    apply_octav,
    calibrate_octav,
    check_coverage,
    convert_octav,
    coverage_report,
    pack_octav,
    remove_octav,
    unpack_octav,
)
from octav_hf.conversion.record import recorded_config
from octav_hf.export import to_onnx
from octav_hf.nn import ATTENTION_OPERANDS
from tests.architectures.models import ARCHITECTURES
from tests.question_answering import logits

MakeBert = Callable[..., BertForQuestionAnswering]
Tensor = torch.Tensor

ALL = dict.fromkeys(("input", *ATTENTION_OPERANDS), "group")
GROUPS = OctavConfig(weight_granularity="group", activation_granularity=ALL, group_size=32, asymmetric_activations=True)
SIZES = {"hidden_size": 40, "intermediate_size": 72, "num_hidden_layers": 1}  # the last groups are shorter


def small_gpt2() -> GPT2LMHeadModel:
    """GPT-2, whose layers are Conv1D and whose head is tied to the embeddings."""
    torch.manual_seed(0)
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=100, n_embd=40, n_layer=1, n_head=4, n_positions=64, **ends)).eval()


def start_logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**batch)[0]


@pytest.mark.parametrize("name", ["Bert", "GPT-2", "DebertaV2", "Llama (grouped keys and values)", "T5", "Longformer"])
def test_every_operand_has_groups(name: str) -> None:
    architecture, losses = ARCHITECTURES[name], []
    for implementation in architecture.implementations:
        model, batch = apply_octav(architecture.make(implementation), GROUPS), architecture.batch()
        loss = model(**batch).loss
        loss.backward()
        losses.append(float(loss))
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
        assert check_coverage(model, batch).unexplained(coverage_report(model)) == []
        assert {row.clip_cell for row in coverage_report(model) if row.bits is not None} == {"octav per group of 32"}
    assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-5)


@pytest.mark.parametrize("static", ["dynamic", "mean", "histogram"])
@pytest.mark.parametrize("model_name", ["BERT", "GPT-2"])
def test_a_checkpoint_brings_them_back(
    small_bert: MakeBert, padded_batch: dict, tmp_path: Path, model_name: str, static: str
) -> None:
    model = apply_octav(small_bert(**SIZES) if model_name == "BERT" else small_gpt2(), GROUPS)
    if static != "dynamic":
        calibrate_octav(model, [padded_batch], observer=static, weights=True, progress_bar=False)
    expected, text = start_logits(model, padded_batch), str(coverage_report(model))
    for form in ("training", "packed"):
        if form == "packed":
            pack_octav(model)
        assert torch.equal(start_logits(model, padded_batch), expected)
        model.save_pretrained(tmp_path / form)
        again = type(model).from_pretrained(tmp_path / form).eval()
        assert torch.equal(start_logits(again, padded_batch), expected)
        assert str(coverage_report(again)) == text
        assert recorded_config(again).group_size == 32
    unpack_octav(again)
    if static != "dynamic":  # else clips are of the packed values
        assert torch.equal(start_logits(again, padded_batch), expected)
    remove_octav(again)
    assert not any("clips" in name for name in again.state_dict())


def test_what_static_clips_are_for(small_bert: MakeBert, padded_batch: dict) -> None:
    """Groups of channels are the same in every token, but groups of keys are not."""
    model = apply_octav(small_bert(**SIZES), GROUPS)
    calibrate_octav(model, [padded_batch], progress_bar=False)
    shapes = {name: tuple(x.shape) for name, x in model.state_dict().items() if name.endswith("clips")}
    layer = "bert.encoder.layer.0"
    attention = f"{layer}.attention.self"
    assert shapes[f"{attention}.query.input_quantizer.clips"] == (1, 2)
    assert shapes[f"{layer}.output.dense.input_quantizer.unsigned_clips"] == (1, 3)
    assert shapes[f"{attention}.query_quantizer.clips"] == (1,)
    assert shapes[f"{attention}.probabilities_quantizer.unsigned_clips"] == (1,)
    assert shapes[f"{attention}.value_quantizer.clips"] == (1, 4, 10)
    assert len(start_logits(model, {name: x[:, :9] for name, x in padded_batch.items()})) == 2


def test_some_modules_have_them(small_bert: MakeBert, padded_batch: dict, tmp_path: Path) -> None:
    override = {"weight_granularity": "group", "activation_granularity": {"input": "group"}, "group_size": 128}
    config = OctavConfig(module_overrides={"*.intermediate.dense": override, "*.query": {**override, "group_size": 32}})
    model = apply_octav(small_bert(**SIZES, seed=1), config)
    cells = {(row.module.split(".")[-1], row.operand): row.clip_cell for row in coverage_report(model)}
    assert cells["query", "input"] == "octav per group of 32"
    assert cells["key", "weight"] == "octav per channel"
    model.save_pretrained(tmp_path)
    again = BertForQuestionAnswering.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again, padded_batch), logits(model, padded_batch))
    del model.octav_config  # the record is then made from the modules
    assert torch.equal(
        logits(apply_octav(small_bert(**SIZES, seed=1), recorded_config(model)), padded_batch),
        logits(model, padded_batch),
    )


def test_sizes_that_no_config_has(small_bert: MakeBert) -> None:
    model = apply_octav(small_bert(**SIZES), GROUPS)
    model.qa_outputs.weight_quantizer.group_size = 64
    with pytest.raises(ValueError, match=r"qa_outputs: its operands have groups of 32 and 64 elements"):
        recorded_config(model)


def test_a_convolution_has_one_clip_per_channel(small_resnet: Callable[..., ResNetForImageClassification]) -> None:
    """A general setting applies to the layers that support it; an override for a convolution is refused."""
    model = apply_octav(small_resnet(), GROUPS)
    cells = {(row.kind, row.operand): row.clip_cell for row in coverage_report(model)}
    assert cells["linear", "weight"] == cells["linear", "input"] == "octav per group of 32"
    assert (cells["convolution", "weight"], cells["convolution", "input"]) == ("octav per channel", "octav per tensor")
    name = "resnet.embedder.embedder.convolution"
    for field, value in (("weight_granularity", "group"), ("activation_granularity", {"input": "group"})):
        with pytest.raises(ValueError, match=rf"{name}: .* has one clip per .*, not per group.*; write module_overr"):
            apply_octav(small_resnet(), OctavConfig(module_overrides={name: {field: value}}))


def test_an_embedding_table_has_one_clip_per_row(small_bert: MakeBert) -> None:
    model = apply_octav(small_bert(**SIZES), OctavConfig(weight_granularity="group", embedding_bits=4))
    cells = {row.kind: row.clip_cell for row in coverage_report(model) if row.operand == "weight"}
    assert cells == {"embedding": "octav per channel", "linear": "octav per group of 64"}


@pytest.mark.parametrize("operand", ["weight", "input", "probabilities"])
def test_integer_products_are_refused(small_bert: MakeBert, padded_batch: dict, tmp_path: Path, operand: str) -> None:
    fields = {"activation_granularity": {operand: "group"}} if operand != "weight" else {"weight_granularity": "group"}
    model = apply_octav(small_bert(**SIZES), OctavConfig(**fields))
    before = set(map(type, model.modules()))
    with pytest.raises(NotImplementedError, match=rf"convert_octav: .* {operand}.* clips for groups.*; train with"):
        convert_octav(model)
    assert set(map(type, model.modules())) == before
    with pytest.raises(NotImplementedError, match=r"to_onnx: .* clips for groups"):
        to_onnx(model, tmp_path / "onnx", padded_batch)
    if operand == "probabilities":  # static, they have one clip for the tensor
        calibrate_octav(model, [padded_batch], progress_bar=False)
        expected = logits(model, padded_batch)
        torch.testing.assert_close(logits(convert_octav(model), padded_batch), expected, rtol=0, atol=1e-5)
