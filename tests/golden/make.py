"""Golden checkpoints: files written by each format version, which all later versions must read.

``python -m tests.golden.make`` writes ``v<format version>/<case>/`` beside this file: a checkpoint, and in
``expected.json`` what a reader has to get from it. Folders that exist are never written again: a change of the format
gets a new version, and the old files stay.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
)

from octav_hf import OctavConfig, apply_octav, calibrate_octav, pack_octav
from octav_hf.config import FORMAT_VERSION
from octav_hf.nn import FakeQuantize, QuantizedLayer
from tests.frozen_activations import frozen_activations

HERE = Path(__file__).parent


def bert(dtype: torch.dtype = torch.float32) -> BertForQuestionAnswering:
    """A random BERT of one layer."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    config = BertConfig(vocab_size=40, max_position_embeddings=16, **sizes)
    return BertForQuestionAnswering(config).eval().to(dtype)


def resnet() -> ResNetForImageClassification:
    """A random ResNet of two stages."""
    torch.manual_seed(0)
    sizes = {"embedding_size": 4, "hidden_sizes": [4, 6], "depths": [1, 1], "layer_type": "basic"}
    return ResNetForImageClassification(ResNetConfig(num_labels=3, **sizes)).eval()


def batch_of(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """An input for the model."""
    generator = torch.Generator().manual_seed(1)
    if isinstance(model, BertForQuestionAnswering):
        return {"input_ids": torch.randint(0, 40, (2, 10), generator=generator)}
    return {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator)}


def frozen(model: PreTrainedModel) -> PreTrainedModel:
    """The model with clips frozen on its batch."""
    return calibrate_octav(model, [batch_of(model)], progress_bar=False)


def static(model: PreTrainedModel) -> PreTrainedModel:
    """The model with all clips frozen and then changed weights, as after training."""
    calibrate_octav(model, [batch_of(model)], weights=True, progress_bar=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.25)
    return model


CASES: dict[str, Callable[[], PreTrainedModel]] = {
    "training_4bit": lambda: apply_octav(bert(), OctavConfig()),
    "training_4bit_frozen": lambda: frozen(apply_octav(bert(), OctavConfig())),
    "training_4bit_static": lambda: static(apply_octav(bert(), OctavConfig())),
    "packed_4bit_static": lambda: pack_octav(static(apply_octav(bert(), OctavConfig()))),
    **{
        f"packed_{bits}bit": lambda bits=bits: pack_octav(
            apply_octav(bert(), OctavConfig(weight_bits=bits, activation_bits=bits))
        )
        for bits in range(2, 9)
    },
    "packed_3bit_bfloat16_frozen": lambda: pack_octav(
        frozen(apply_octav(bert(torch.bfloat16), OctavConfig(weight_bits=3)))
    ),
    "packed_4bit_embeddings_8bit": lambda: pack_octav(apply_octav(bert(), OctavConfig()), embedding_bits=8),
    "packed_4bit_per_tensor_overrides": lambda: pack_octav(
        apply_octav(
            bert(),
            OctavConfig(
                weight_granularity="tensor",
                exclude_modules=["qa_outputs"],
                module_overrides={"*.query": {"weight_bits": 5, "weight_granularity": "channel"}},
            ),
        )
    ),
    "packed_4bit_accurate": lambda: pack_octav(apply_octav(bert(), OctavConfig.accurate())),
    "packed_4bit_accurate_frozen": lambda: pack_octav(frozen(apply_octav(bert(), OctavConfig.accurate()))),
    "packed_4bit_resnet": lambda: pack_octav(frozen(apply_octav(resnet(), OctavConfig(first_last_bits=8)))),
}


def expected_of(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> dict[str, Any]:
    """What a reader has to get: quantized weights bit for bit, frozen clips exactly, outputs for ``batch`` nearly.

    Outputs are not the same bit for bit on every machine, because sums are not.
    """
    weights = {}
    for name, layer in model.named_modules():
        if isinstance(layer, QuantizedLayer) and isinstance(layer.weight_quantizer, FakeQuantize):
            weight = layer.weight_quantizer(layer.weight).detach().contiguous()
            weights[name] = hashlib.sha256(weight.view(torch.uint8).numpy()).hexdigest()
    with torch.no_grad():
        outputs = model(**batch).to_tuple()
    return {
        "batch": {name: value.tolist() for name, value in batch.items()},
        "weights": weights,
        "activation_clips": frozen_activations(model),
        "outputs": [output.double().flatten().tolist() for output in outputs],
    }


def main() -> None:
    """Write the missing cases of this version."""
    for case, make in CASES.items():
        folder = HERE / f"v{FORMAT_VERSION}" / case
        if folder.exists():
            print(f"kept {folder.relative_to(HERE)}")
            continue
        model = make()
        expected = expected_of(model, batch_of(model))
        model.save_pretrained(folder)
        (folder / "expected.json").write_text(json.dumps(expected, indent=1) + "\n", encoding="utf-8")
        print(f"wrote {folder.relative_to(HERE)}")


if __name__ == "__main__":
    sys.exit(main())
