"""``activation_granularity`` on whole models: grids, reports, frozen clips, checkpoints, export and refusals."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForQuestionAnswering, BertForQuestionAnswering, ResNetForImageClassification
from transformers.pytorch_utils import Conv1D

from octav_hf import (
    OctavConfig,
    apply_octav,
    calibrate_octav,
    check_coverage,
    coverage_report,
    model_card,
    pack_octav,
    uncalibrate_octav,
)
from octav_hf.conversion.record import recorded_config
from octav_hf.nn import ATTENTION_OPERANDS, FakeQuantize, QuantizedAttention
from tests.architectures.models import ARCHITECTURES
from tests.bert_twin import clips_of_parts
from tests.frozen_activations import frozen_activations
from tests.question_answering import logits
from tests.twins import as_float64, quantize_twin

MakeBert = Callable[..., BertForQuestionAnswering]
Tensor = torch.Tensor

FINEST = {"input": "token", "query": "token", "key": "token", "probabilities": "token", "value": "channel"}
HEADS = dict.fromkeys(ATTENTION_OPERANDS, "attn_head")
ATTENTION = "bert.encoder.layer.0.attention.self"


def octav(model: nn.Module, granularity: dict[str, str], **fields: object) -> nn.Module:
    return apply_octav(model, OctavConfig(activation_granularity=granularity, **fields))


def cells(model: nn.Module) -> dict[str, set[str]]:
    """Operand -> granularity in the report."""
    found: dict[str, set[str]] = {}
    for row in coverage_report(model):
        if row.bits is not None and row.operand != "weight":
            found.setdefault(row.operand, set()).add(row.clip_cell)
    return found


@pytest.mark.parametrize("granularity", [FINEST, HEADS], ids=["finest", "heads"])
@pytest.mark.parametrize("name", ["Bert", "GPT-2", "DebertaV2", "Llama (grouped keys and values)", "T5", "Longformer"])
def test_every_operand_is_quantized_as_asked(name: str, granularity: dict[str, str]) -> None:
    """Nothing stays in float, whichever functions attention uses, and eager and sdpa agree."""
    architecture, losses = ARCHITECTURES[name], []
    for implementation in architecture.implementations:
        model, batch = octav(architecture.make(implementation), granularity), architecture.batch()
        loss = model(**batch).loss
        loss.backward()
        losses.append(float(loss))
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
        assert check_coverage(model, batch).unexplained(coverage_report(model)) == []
        expected = {operand: {f"octav per {granularity.get(operand, 'tensor')}"} for operand in cells(model)}
        assert cells(model) == expected
    assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-5)
    assert losses[-1] != float(apply_octav(architecture.make(), OctavConfig())(**batch).loss)


def test_a_sentence_does_not_depend_on_those_beside_it(small_bert: MakeBert, padded_batch: dict) -> None:
    """With clips per token, head or channel, a sentence is independent of the batch; with one per tensor, it is not."""
    for granularity, alike in ((FINEST, True), ({}, False)):
        model = octav(small_bert(), granularity)
        with torch.no_grad():
            together = model(**padded_batch).start_logits[:1]
            alone = model(**{name: x[:1] for name, x in padded_batch.items()}).start_logits
        assert bool((together - alone).abs().max() < 1e-5 * together.abs().max()) is alike


def test_both_kinds_of_linear_layers_have_a_clip_per_token() -> None:
    torch.manual_seed(0)
    for layer in (nn.Linear(8, 5), Conv1D(5, 8)):
        weight = layer.weight.detach() if isinstance(layer, nn.Linear) else layer.weight.detach().t()
        model = octav(nn.Sequential(layer), {"input": "token"})
        x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 5.0, 0.1])[:, None]
        quantized = quantize_twin(x, clips_of_parts(x, 4, True, (-1,)).astype(np.float32), 4)
        weights = quantize_twin(weight, clips_of_parts(weight, 4, True, (-1,)).astype(np.float32), 4)
        expected = quantized @ weights.T + as_float64(layer.bias)
        np.testing.assert_allclose(model(x).detach().numpy(), expected, rtol=1e-5, atol=1e-5)


def test_an_override_replaces_the_granularities_there(small_bert: MakeBert) -> None:
    overrides = {ATTENTION: {"activation_granularity": {"key": "attn_head"}}}
    model = octav(small_bert(), FINEST, module_overrides=overrides)
    rows = {(row.module, row.operand): row.granularity for row in coverage_report(model) if row.bits is not None}
    assert {operand: rows[ATTENTION, operand] for operand in ATTENTION_OPERANDS} == {
        **dict.fromkeys(ATTENTION_OPERANDS, "tensor"),
        "key": "attn_head",
    }
    assert rows[f"{ATTENTION}.query", "input"] == "tensor"
    assert rows["bert.encoder.layer.1.attention.self", "value"] == "channel"
    assert rows["qa_outputs", "input"] == "token"


# Convolutions.


def test_a_convolutions_input_has_one_clip_whatever_linear_layers_have(
    small_resnet: Callable[..., ResNetForImageClassification],
) -> None:
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    model = octav(small_resnet(), {"input": "token"})
    rows = [row for row in coverage_report(model) if row.operand == "input"]
    assert {(row.kind, row.granularity) for row in rows} == {("convolution", "tensor"), ("linear", "token")}
    assert check_coverage(model, images) == []
    assert "per tensor or token" in str(model_card(model))


def test_a_convolution_that_is_asked_for_tokens_by_name_is_refused(
    small_resnet: Callable[..., ResNetForImageClassification],
) -> None:
    model = small_resnet()
    name = next(name for name, module in model.named_modules() if isinstance(module, nn.Conv2d))
    overrides = {name: {"activation_granularity": {"input": "token"}}}
    message = (
        rf"^{name}: the input of this Conv2d has one clip per tensor, not per token: the layer sums over positions"
    )
    with pytest.raises(ValueError, match=message):
        apply_octav(model, OctavConfig(module_overrides=overrides))
    assert not any(isinstance(module, FakeQuantize) for module in model.modules())
    container = {"resnet.embedder": {"activation_granularity": {"input": "token"}}}
    apply_octav(model, OctavConfig(module_overrides=container))


# Frozen clips.


def batches() -> list[dict[str, Tensor]]:
    """Of different lengths and sizes."""
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(0, 100, (1 + i, 6 + 4 * i), generator=generator)} for i in range(3)]


def operands_met(model: nn.Module) -> dict[str, list[Tensor]]:
    """Operand -> list that collects the inputs of the quantizers of ``ATTENTION``."""
    met: dict[str, list[Tensor]] = {}
    attention = model.get_submodule(ATTENTION)
    assert isinstance(attention, QuantizedAttention)
    for operand, quantizer in attention.operand_quantizers.items():
        quantizer.register_forward_pre_hook(
            lambda module, args, operand=operand: met.setdefault(operand, []).append(args[0].clone())
        )
    return met


def test_what_is_frozen_is_the_mean_of_what_was_computed(small_bert: MakeBert) -> None:
    """Frozen clips of heads and channels are means over all sentences; tokens get one clip per tensor."""
    granularity = {
        "input": "token",
        "query": "attn_head",
        "key": "token",
        "probabilities": "attn_head",
        "value": "channel",
    }
    model = octav(small_bert(), granularity, activation_bits=8)
    met = operands_met(model)
    calibrate_octav(model, batches(), progress_bar=False)
    clips = frozen_activations(model)[ATTENTION]
    for operand, axes in (("query", (-2, -1)), ("probabilities", (-2, -1)), ("value", (-1,))):
        of_calls = [clips_of_parts(x, 8, operand != "probabilities", axes) for x in met[operand]]
        expected = np.concatenate(of_calls).mean(0)
        (got,) = clips[operand]["clips"]
        np.testing.assert_allclose(np.array(got).reshape(expected.shape), expected, rtol=1e-4)
    assert np.array(clips["value"]["clips"]).shape == (1, 4, 8)
    of_tensors = [float(clips_of_parts(x, 8, True, None)) for x in met["key"]]
    assert clips["key"]["clips"] == [pytest.approx(np.mean(of_tensors), rel=1e-4)]
    assert cells(model) == {
        **{operand: {f"octav per {name}, frozen"} for operand, name in granularity.items()},
        "input": {"octav per tensor, frozen"},
        "key": {"octav per tensor, frozen"},
    }
    for batch in batches():
        assert check_coverage(model, batch) == []
    activations = (
        "(input per tensor, query per attn_head, key per tensor, probabilities per attn_head, value per channel)"
    )
    assert f"8 bits, clip `octav` {activations}, frozen after calibration |" in str(model_card(model))


def test_frozen_tokens_are_those_of_one_clip_per_tensor(small_bert: MakeBert, padded_batch: dict) -> None:
    """Calibration runs with one clip per tensor, too."""
    tokens = dict.fromkeys(("input", "query", "key", "probabilities"), "token")
    models = [octav(small_bert(), granularity) for granularity in (tokens, {})]
    for model in models:
        calibrate_octav(model, batches(), progress_bar=False)
    assert frozen_activations(models[0]) == frozen_activations(models[1])
    assert torch.equal(*(logits(model, padded_batch) for model in models))


def test_heads_and_batch_in_one_dimension_have_one_frozen_clip() -> None:
    architecture = ARCHITECTURES["DebertaV2"]
    model = calibrate_octav(octav(architecture.make(), HEADS), [architecture.batch()], progress_bar=False)
    assert {cell for operand in ATTENTION_OPERANDS for cell in cells(model)[operand]} == {"octav per tensor, frozen"}


def test_uncalibrated_is_as_fine_as_before(small_bert: MakeBert, padded_batch: dict) -> None:
    for granularity in (FINEST, HEADS):
        model, dynamic = (octav(small_bert(), granularity) for _ in range(2))
        calibrate_octav(model, batches(), progress_bar=False)
        assert not torch.equal(logits(model, padded_batch), logits(dynamic, padded_batch))
        uncalibrate_octav(model)
        assert cells(model) == cells(dynamic)
        assert torch.equal(logits(model, padded_batch), logits(dynamic, padded_batch))


@pytest.mark.parametrize("granularity", [FINEST, HEADS], ids=["finest", "heads"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_comes_back_from_a_checkpoint_bit_for_bit(
    small_bert: MakeBert, padded_batch: dict, tmp_path: Path, granularity: dict[str, str], packed: bool, frozen: bool
) -> None:
    model = octav(small_bert(), granularity)
    if frozen:
        calibrate_octav(model, batches(), progress_bar=False)
    if packed:
        pack_octav(model)
    expected = logits(model, padded_batch)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForQuestionAnswering.from_pretrained(tmp_path)
    assert loaded.config.quantization_config.to_dict() == recorded_config(model).to_dict()
    assert cells(loaded) == cells(model)
    assert torch.equal(logits(loaded, padded_batch), expected)
    assert torch.equal(logits(copy.deepcopy(loaded), padded_batch), expected)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_frozen_packed_and_exported(small_bert: MakeBert, padded_batch: dict, implementation: str) -> None:
    granularity = FINEST | {"query": "attn_head"}
    model = octav(small_bert(attn_implementation=implementation), granularity)
    pack_octav(calibrate_octav(model, batches(), progress_bar=False))
    model.config.return_dict = False
    example = (padded_batch["input_ids"], padded_batch["attention_mask"])
    sizes = {0: torch.export.Dim("batch", min=1, max=64), 1: torch.export.Dim("length", min=2, max=64)}
    with torch.no_grad():
        exported = torch.export.export(model, example, dynamic_shapes=(sizes, sizes)).module()
        for inputs in (example, tuple(x[:1, :5] for x in example)):
            assert all(map(torch.equal, exported(*inputs), model(*inputs)))


def test_frozen_clips_of_another_model_name_the_operand_and_both_shapes(
    small_bert: MakeBert, padded_batch: dict
) -> None:
    calibrated = calibrate_octav(octav(small_bert(), HEADS), batches(), progress_bar=False)
    other = octav(small_bert(num_attention_heads=2), HEADS)
    other.load_state_dict(calibrated.state_dict())
    message = rf"^{ATTENTION} query: its frozen clips have the shape \(4,\), .*\(2, 2, 16, 16\).*needs .*\(2,\)"
    with pytest.raises(ValueError, match=message):
        other(**padded_batch)
    coarser = apply_octav(small_bert(), OctavConfig())
    with pytest.raises(RuntimeError, match=rf"{ATTENTION}.query_quantizer: the frozen clips .* shape \(1, 4\)"):
        coarser.load_state_dict(calibrated.state_dict())
