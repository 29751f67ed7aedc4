"""Bytes per module: those of the tensors that ``save_pretrained`` writes for a packed model."""

from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import BertConfig, BertForMaskedLM, PreTrainedModel

from octav_hf import OctavConfig, apply_octav, pack_octav
from octav_hf.analysis.layer_bytes import layer_bytes

CONFIGS = {
    "paper": OctavConfig(),
    "groups and embeddings": OctavConfig.groups(weight_bits=3, embedding_bits=8, group_size=32),
    "part in float": OctavConfig(exclude_modules=["qa_outputs"], weight_granularity="tensor"),
}


@pytest.fixture
def tied() -> PreTrainedModel:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    return BertForMaskedLM(BertConfig(vocab_size=100, max_position_embeddings=64, **sizes))


def written(model: PreTrainedModel, folder: Path) -> dict[str, int]:
    """Module -> bytes of its tensors in the file."""
    model.save_pretrained(folder)
    sizes: dict[str, int] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        module = name.removesuffix("_scale").rpartition(".")[0]
        sizes[module] = sizes.get(module, 0) + tensor.nbytes
    return sizes


@pytest.mark.parametrize("name", CONFIGS)
def test_bytes_are_those_of_the_packed_file(
    small_bert: Callable[..., PreTrainedModel], tmp_path: Path, name: str
) -> None:
    model = apply_octav(small_bert(), CONFIGS[name])
    before = layer_bytes(model)
    float32 = {layer.module: layer.float32_bytes for layer in before}
    own = {name: sum(p.nbytes for p in module.parameters(recurse=False)) for name, module in model.named_modules()}
    assert float32 == {name: size for name, size in own.items() if size}
    pack_octav(model)
    assert layer_bytes(model) == before
    assert {layer.module: layer.bytes for layer in before} == written(model, tmp_path)


def test_shared_weights_count_once_and_in_float(tied: PreTrainedModel, tmp_path: Path) -> None:
    model = apply_octav(tied, OctavConfig())
    sizes = {layer.module: layer.bytes for layer in layer_bytes(model)}
    pack_octav(model)
    assert sum(sizes.values()) == sum(written(model, tmp_path).values())
    assert "cls.predictions.decoder" not in sizes
