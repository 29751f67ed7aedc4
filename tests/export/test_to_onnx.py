"""Exports of ``to_onnx`` run with integers in ONNX Runtime and give the model's results."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn
from transformers import AutoConfig, BertForMaskedLM, BertForQuestionAnswering

from octav_hf import OctavConfig, apply_octav, calibrate_octav, pack_octav
from octav_hf.export import to_onnx, verify_onnx
from octav_hf.export.example_inputs import random_inputs
from octav_hf.nn import FakeQuantize
from tests.architectures.models import ARCHITECTURES

from .conftest import Batch, MakeBert, assert_same, expected, quantized, run

PRODUCTS = {
    "Bert": 10,
    "Roberta": 10,
    "DistilBert": 10,
    "Electra": 11,
    "Albert (shared layers)": 19,
    "MPNet": 10,
    "DebertaV2": 14,
    "ViT": 10,
    "ResNet": 13,
    "MobileNetV2": 53,
}
"""Architecture -> linear layers and convolutions that run, and two matmuls in each attention module, in one layer."""
ONE_LAYER = {"num_hidden_layers": 1, "n_layers": 1}
CASES = [*((name, 4) for name in PRODUCTS), *((name, 8) for name in ("Bert", "DebertaV2", "ResNet"))]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "bits"), CASES)
def test_every_product_of_an_architecture_is_of_integers(name: str, bits: int, tmp_path: Path) -> None:
    whole = ARCHITECTURES[name]
    fewer = {key: value for key, value in ONE_LAYER.items() if key in whole.config and "Albert" not in name}
    architecture = replace(whole, config=whole.config | fewer)
    batch = {key: x for key, x in architecture.batch().items() if key != "labels"}
    model = quantized(architecture.make(), batch, OctavConfig(weight_bits=bits, activation_bits=bits))
    to_onnx(model, tmp_path, batch)
    check = verify_onnx(model, tmp_path, batch)
    assert (check.integer_products, check.float_products) == (PRODUCTS[name], [])
    assert check.same_choices == check.choices == 2
    assert_same(model, tmp_path, batch)


def test_batch_and_length_are_free(exported: tuple[Any, Path, Batch]) -> None:
    model, folder, batch = exported
    for rows, length in ((1, 16), (3, 5)):
        other = {name: x[:1].expand(rows, -1)[:, :length].contiguous() for name, x in batch.items()}
        assert_same(model, folder, other)


@pytest.mark.slow
def test_the_most_accurate_recipe(small_bert: MakeBert, padded_batch: Batch, tmp_path: Path) -> None:
    # Clips per head and channel, asymmetric grids, and embeddings.
    config = OctavConfig.accurate(weight_bits=3, activation_bits=6, embedding_bits=4)
    model = quantized(small_bert(hidden_act="gelu"), padded_batch, config)
    quantizers = [each.frozen for each in model.modules() if isinstance(each, FakeQuantize) and each.is_frozen]
    assert any(frozen.offset is not None for frozen in quantizers)
    assert any(frozen.clips.dim() == 3 for frozen in quantizers)
    to_onnx(model, tmp_path, padded_batch)
    assert verify_onnx(model, tmp_path, padded_batch).integer_products == 17
    assert_same(model, tmp_path, padded_batch)


@pytest.mark.slow
def test_the_preset_with_clips_that_have_learned(small_bert: MakeBert, padded_batch: Batch, tmp_path: Path) -> None:
    model = apply_octav(small_bert(hidden_act="gelu"), OctavConfig.onnxruntime())
    calibrate_octav(model.eval(), [padded_batch], weights=True, learned=True, progress_bar=False)
    with torch.no_grad():
        corrections = [x for name, x in model.named_parameters() if name.endswith("clip_correction")]
        for correction in corrections:
            correction.fill_(-0.002)
    assert len(corrections) == 13 + 2 * 4
    to_onnx(model, tmp_path, padded_batch)
    assert verify_onnx(model, tmp_path, padded_batch).integer_products == 17
    assert_same(model, tmp_path, padded_batch)


@pytest.mark.slow
def test_a_decoder_is_exported_without_its_cache(tmp_path: Path) -> None:
    whole = ARCHITECTURES["GPT-2"]
    batch = {name: x for name, x in whole.batch().items() if name != "labels"}
    model = quantized(replace(whole, config=whole.config | {"n_layer": 1}).make(), batch)
    assert model(**batch).past_key_values is not None
    to_onnx(model, tmp_path, batch)
    check = verify_onnx(model, tmp_path, batch)
    assert (check.integer_products, check.float_products) == (4 + 1 + 2, [])
    np.testing.assert_allclose(run(tmp_path, batch)["logits"], expected(model, batch)["logits"], rtol=0, atol=2e-6)
    assert model.config.use_cache


def test_weights_in_the_file(exported: tuple[Any, Path, Batch]) -> None:
    model, folder, _ = exported
    graph = onnx.load(folder / "model.onnx").graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            narrow = stored[f"{name}.int4_weight.packed"]
            assert narrow.data_type == onnx.TensorProto.INT4
            assert len(narrow.raw_data) == layer.weight.numel() // 2
            values = onnx.numpy_helper.to_array(narrow).astype(np.float32)
            values = values * onnx.numpy_helper.to_array(stored[f"{name}.weight_scale"])
            np.testing.assert_array_equal(values.T, layer.weight_quantizer(layer.weight).detach().numpy())
            assert f"{name}.weight" not in stored


def test_the_folder(exported: tuple[Any, Path, Batch]) -> None:
    model, folder, batch = exported
    assert {path.name for path in folder.iterdir()} == {"model.onnx", "config.json", "octav_export.json"}
    stored = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in stored
    assert stored["architectures"] == ["BertForQuestionAnswering"]
    assert type(AutoConfig.from_pretrained(folder)) is type(model.config)
    file = onnx.load(folder / "model.onnx")
    assert ([(entry.domain, entry.version) for entry in file.opset_import], file.ir_version) == ([("", 21)], 10)
    assert {entry.key: entry.value for entry in file.metadata_props}["octav_hf.weight_bits"] == "4"
    assert [value.name for value in file.graph.input] == list(batch)
    assert [value.name for value in file.graph.output] == ["start_logits", "end_logits"]
    assert str(Path(torch.__file__).parent).encode() not in (folder / "model.onnx").read_bytes()


@pytest.mark.slow
def test_a_packed_model_and_one_that_was_loaded(
    exported: tuple[Any, Path, Batch], small_bert: MakeBert, tmp_path: Path
) -> None:
    model, folder, batch = exported
    other = small_bert()
    quantized(other, batch)
    other.load_state_dict(model.state_dict())
    pack_octav(other).save_pretrained(tmp_path / "packed")
    loaded = BertForQuestionAnswering.from_pretrained(tmp_path / "packed")
    before = expected(loaded, batch)
    to_onnx(loaded, tmp_path / "onnx", batch)
    np.testing.assert_array_equal(expected(loaded, batch)["start_logits"], before["start_logits"])
    np.testing.assert_array_equal(run(tmp_path / "onnx", batch)["start_logits"], run(folder, batch)["start_logits"])
    assert "quantization_config" not in json.loads((tmp_path / "onnx" / "config.json").read_text())


@pytest.mark.slow
def test_what_is_in_float_stays_so_and_is_listed(small_bert: MakeBert, padded_batch: Batch, tmp_path: Path) -> None:
    overrides = {
        "bert.encoder.layer.0.intermediate.dense": {"activation_bits": None},
        "bert.encoder.layer.0.output.dense": {"weight_bits": None},
        "bert.encoder.layer.1.attention.self": {"quantize_attention": False},
    }
    config = OctavConfig(activation_bits=8, exclude_modules=["qa_outputs"], module_overrides=overrides)
    model = quantized(small_bert(), padded_batch, config)
    to_onnx(model, tmp_path, padded_batch)
    check = verify_onnx(model, tmp_path, padded_batch)
    assert check.integer_products == 17 - 3 - 2
    modules = sorted(name.partition("/")[0] for name in check.float_products)
    assert modules == sorted([*overrides, "bert.encoder.layer.1.attention.self", "qa_outputs"])
    assert_same(model, tmp_path, padded_batch)


@pytest.mark.slow
def test_a_tied_head(padded_batch: Batch, tmp_path: Path, small_bert: MakeBert) -> None:
    torch.manual_seed(0)
    model = BertForMaskedLM(small_bert().config).eval()
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
    quantized(model, padded_batch, OctavConfig(activation_bits=8, embedding_bits=8))
    to_onnx(model, tmp_path, padded_batch)
    assert verify_onnx(model, tmp_path, padded_batch).integer_products == 2 * 8 + 2
    assert_same(model, tmp_path, padded_batch)


class Convolutions(nn.Module):
    """Convolutions with all options: each kind of padding, strides, groups, dilation, one dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, (3, 5), padding=(2, 1), stride=(2, 1), bias=False)
        self.second = nn.Conv2d(8, 8, 3, padding="same", groups=4, dilation=2)
        self.third = nn.Conv2d(8, 4, 3, padding=1, padding_mode="circular")
        self.fourth = nn.Conv1d(4, 6, 4, padding="same")

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.fourth(self.third(self.second(self.first(pixels)).relu()).flatten(2))


def test_convolutions(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, batch = Convolutions(), {"pixels": torch.randn(2, 3, 9, 8)}
    quantized(model, batch, OctavConfig(weight_bits=8, activation_bits=8))
    to_onnx(model, tmp_path, batch)
    assert verify_onnx(model, tmp_path, batch).integer_products == 4
    with torch.no_grad():
        np.testing.assert_allclose(run(tmp_path, batch)["output"], model(**batch).numpy(), rtol=0, atol=1e-6)


@pytest.mark.slow
def test_an_activation_of_zeros(small_bert: MakeBert, padded_batch: Batch, tmp_path: Path) -> None:
    model = small_bert()
    nn.init.zeros_(model.bert.encoder.layer[0].intermediate.dense.weight)
    quantized(model, padded_batch)
    to_onnx(model, tmp_path, padded_batch)
    assert_same(model, tmp_path, padded_batch)


@pytest.mark.slow
def test_models_that_are_refused(small_bert: MakeBert, padded_batch: Batch, tmp_path: Path) -> None:
    model = small_bert()
    with pytest.raises(ValueError, match="no module quantized by apply_octav"):
        to_onnx(model, tmp_path, padded_batch)
    apply_octav(model, OctavConfig())
    with pytest.raises(ValueError, match=r"self query.*, .* key, .* and \d+ more .*calibrate_octav\(model, batches\)"):
        to_onnx(model, tmp_path, padded_batch)
    calibrate_octav(model, [padded_batch], progress_bar=False)
    labels = {"start_positions": torch.tensor([0, 1]), "end_positions": torch.tensor([1, 2])}
    with pytest.raises(ValueError, match="leave labels out"):
        to_onnx(model, tmp_path, padded_batch | labels)
    with pytest.raises(TypeError, match="mapping"):
        to_onnx(model, tmp_path, padded_batch["input_ids"])  # type: ignore[arg-type]
    (tmp_path / "there").touch()
    with pytest.raises(FileExistsError):  # before the model runs, which would raise the error of labels
        to_onnx(model, tmp_path, padded_batch | labels)


def test_made_up_batches(small_bert: MakeBert) -> None:
    inputs = random_inputs(small_bert())
    assert list(inputs) == ["input_ids", "attention_mask", "token_type_ids"]
    assert {tuple(x.shape) for x in inputs.values()} == {(2, 16)}
    images = random_inputs(ARCHITECTURES["ViT"].make())
    assert {name: tuple(x.shape) for name, x in images.items()} == {"pixel_values": (2, 3, 16, 16)}
