"""The tensors that are measured: the inputs of a model's quantizers for a batch."""

from __future__ import annotations

import pytest
import torch
from clip_measurements.tensors import seen_tensors
from squad_files import DATA
from squad_task.features import Windows, training_batch
from transformers import AutoTokenizer, BertForQuestionAnswering

import octav_hf


def test_what_the_quantizers_see(tiny_model: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    batch = training_batch(str(DATA / "train.json"), tokenizer, Windows(64, 16, 32, False), 3, seed=0)
    assert batch["input_ids"].shape[0] == 3
    model = BertForQuestionAnswering.from_pretrained(tiny_model).eval()
    with torch.no_grad():
        embeddings = model.bert.embeddings(batch["input_ids"], batch["token_type_ids"])
    octav_hf.apply_octav(model, octav_hf.OctavConfig(weight_bits=4, activation_bits=8))
    seen = {entry.name: entry for entry in seen_tensors(model, batch)}
    first = next(iter(seen.values()))
    assert first.name == "bert.encoder.layer.0.attention.self.query input"
    assert torch.equal(first.values, embeddings)
    weight = seen["bert.encoder.layer.1.output.dense weight"]
    assert torch.equal(weight.values, model.bert.encoder.layer[1].output.dense.weight)
    assert (weight.kind, weight.dim) == ("weight", (1,))
    probabilities = seen["bert.encoder.layer.0.attention.self probabilities"]
    torch.testing.assert_close(probabilities.values.sum(dim=-1), torch.ones(3, 2, batch["input_ids"].shape[1]))
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_layer_that_runs_twice_and_clips_that_are_frozen(tiny_model: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    batch = training_batch(str(DATA / "train.json"), tokenizer, Windows(64, 16, 32, False), 2, seed=0)
    model = BertForQuestionAnswering.from_pretrained(tiny_model).eval()
    model.bert.encoder.layer[1] = model.bert.encoder.layer[0]
    octav_hf.apply_octav(model, octav_hf.OctavConfig())
    dynamic = seen_tensors(model, batch)
    names = [entry.name for entry in dynamic]
    layer = "bert.encoder.layer.0.output.dense"
    assert [name for name in names if name.startswith(layer)] == [
        f"{layer} input",
        f"{layer} weight",
        f"{layer} input, use 2",
    ]
    # six weights, and twice four inputs and four operands; the head
    assert len(names) == len(set(names)) == 6 + 2 * 8 + 2
    octav_hf.calibrate_octav(model, [batch])
    assert [entry.signed for entry in seen_tensors(model, batch)] == [entry.signed for entry in dynamic]


def test_a_model_without_quantized_tensors(tiny_model: str) -> None:
    model = BertForQuestionAnswering.from_pretrained(tiny_model)
    with pytest.raises(ValueError, match="BertForQuestionAnswering has no quantized tensor.*call apply_octav"):
        seen_tensors(model, {})


def test_a_packed_model(tiny_model: str) -> None:
    model = octav_hf.apply_octav(BertForQuestionAnswering.from_pretrained(tiny_model), octav_hf.OctavConfig())
    octav_hf.pack_octav(model)
    with pytest.raises(ValueError, match=r"bert\.encoder\.layer\.0\.\S+ is packed.*Measure the training form"):
        seen_tensors(model, {})
