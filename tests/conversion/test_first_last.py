"""``first_last_bits``: finding the first and the last layer, and errors if they are not clear."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from octav_hf import OctavConfig, apply_octav
from octav_hf.conversion.first_last import first_and_last
from tests.resnet_outside_transformers import ResNet

MakeModel = Callable[..., nn.Module]
CONFIG = OctavConfig(first_last_bits=8)


def small_vit(**changes: object) -> nn.Module:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return ViTForImageClassification(ViTConfig(image_size=16, patch_size=8, num_labels=5, **(sizes | changes)))


def test_of_known_models(small_resnet: MakeModel, small_mobilenet: MakeModel) -> None:
    assert first_and_last(small_resnet()) == ("resnet.embedder.embedder.convolution", "classifier.1")
    stem = "mobilenet_v2.conv_stem.first_conv.convolution"
    assert first_and_last(small_mobilenet()) == (stem, "classifier")
    assert first_and_last(small_vit()) == ("vit.embeddings.patch_embeddings.projection", "classifier")
    assert first_and_last(ResNet()) == ("conv1", "fc")


class WithConfig(nn.Sequential):
    """Layers with the config of a Transformers model."""

    def __init__(self, *layers: nn.Module, **config: Any):
        super().__init__(*layers)
        self.config = type("Config", (), config)()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.Conv2d(3, 4, 1)), "Sequential has fewer than two layers"),
        (nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), "the first layer of Sequential, 0, is a Linear"),
        (nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)), "the last layer of Sequential, 1, is a Conv2d"),
        (
            WithConfig(nn.Conv2d(3, 4, 1), nn.Linear(4, 2), num_labels=5),
            "the last layer, 1, has 2 outputs for 5 labels",
        ),
        (WithConfig(nn.Conv2d(4, 4, 1), nn.Linear(4, 2), num_channels=3), "0, has 4 inputs, but images have 3"),
        (
            WithConfig(nn.Conv2d(3, 4, 1), nn.Linear(4, 2), nn.Linear(4, 2), num_labels=2),
            "WithConfig has two heads, 1 and 2",
        ),
    ],
    ids=["one layer", "first is linear", "no head", "other labels", "other channels", "two heads"],
)
def test_unclear_is_refused(model: nn.Module, message: str) -> None:
    with pytest.raises(ValueError, match=f"first_last_bits: .*{message}.*module_overrides="):
        apply_octav(model, CONFIG)
    assert {type(layer) for layer in model} <= {nn.Conv2d, nn.Linear}


def test_bert_is_refused(small_bert: MakeModel) -> None:
    with pytest.raises(ValueError, match="the first layer of BertForQuestionAnswering, .*query, is a Linear"):
        apply_octav(small_bert(), CONFIG)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"exclude_modules": ["fc"]}, "first_last_bits and exclude_modules 'fc' contradict: .*'fc'"),
        (
            {"module_overrides": {"conv*": {"activation_bits": 6}}},
            r"first_last_bits and module_overrides 'conv\*' both set activation_bits: .*'conv1'",
        ),
        (
            {"weight_bits": None, "activation_bits": None, "module_overrides": {"layer1": {"weight_bits": 4}}},
            "first_last_bits=8 has no effect on conv1, whose weight_bits and activation_bits are None",
        ),
    ],
    ids=["excluded", "overridden", "float"],
)
def test_contradictions_are_refused(fields: dict[str, Any], message: str) -> None:
    model = ResNet()
    with pytest.raises(ValueError, match=message):
        apply_octav(model, OctavConfig(first_last_bits=8, **fields))
    assert type(model.conv1) is nn.Conv2d


def test_other_overrides_of_those_layers_hold() -> None:
    model = apply_octav(ResNet(), OctavConfig(first_last_bits=6, module_overrides={"fc": {"weight_clip": "max"}}))
    assert (model.fc.weight_quantizer.clip, model.fc.weight_quantizer.num_bits) == ("max", 6)
