"""A small ResNet and a small MobileNetV2 from Transformers, with random weights."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from transformers import (
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
)

LABELS = 10


def resnet() -> PreTrainedModel:
    """Six basic blocks of 16, 32 and 64 channels, 176 thousand parameters."""
    return ResNetForImageClassification(
        ResNetConfig(
            num_channels=1,
            num_labels=LABELS,
            embedding_size=16,
            hidden_sizes=[16, 32, 64],
            depths=[2, 2, 2],
            layer_type="basic",
        )
    )


def mobilenet() -> PreTrainedModel:
    """MobileNetV2 at a quarter of its width, 162 thousand parameters.

    Batch norms have momentum 0.1. Transformers' default 0.997 is in TensorFlow's notation, where it means 0.003; in
    torch, evaluation would use the statistics of the last batch only.
    """
    model = MobileNetV2ForImageClassification(
        MobileNetV2Config(
            num_channels=1,
            num_labels=LABELS,
            depth_multiplier=0.25,
            finegrained_output=False,
            classifier_dropout_prob=0.2,
        )
    )
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.1
    return model


MODELS: dict[str, Callable[[], PreTrainedModel]] = {"resnet": resnet, "mobilenet_v2": mobilenet}
