"""The small models with which histories start."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn
from transformers import PreTrainedModel

ROWS = 40
"""Of the token embeddings at the beginning; batches hold lower numbers than any resizing leaves."""

# Weights large enough that every layer matters for the outputs.
_SIZES = {
    "initializer_range": 0.3,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "vocab_size": ROWS,
    "max_position_embeddings": 16,
}
_DEBERTA = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 4, "type_vocab_size": 0}
_GPT2 = {"initializer_range": 0.3, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16, "vocab_size": ROWS}
_T5 = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "vocab_size": ROWS}
_SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def _tokens(seed: int) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(5, 30, (2, 6), generator=torch.Generator().manual_seed(seed))}


def _padded(seed: int) -> dict[str, Tensor]:
    return _tokens(seed) | {"attention_mask": torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])}


def _causal(seed: int) -> dict[str, Any]:
    return _tokens(seed) | {"use_cache": False}


def _translation(seed: int) -> dict[str, Any]:
    return _causal(seed) | {"decoder_input_ids": _tokens(seed + 100)["input_ids"]}


def _images(seed: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed))}


@dataclass(frozen=True)
class Kind:
    """One kind of model.

    Args:
        model_class, config_class, config: how to make it.
        head: the name of its last linear layer.
        layers: name patterns of some of its layers, for configs.
        base_class: ``AutoModel``'s class for it.
        other_class: one with another head.
        adapted: the last parts of the names of layers that adapters are put on.
        batch: seed -> inputs.
        base: the part of it, and of a model of those other classes, whose outputs must be equal.
    """

    model_class: type[PreTrainedModel]
    config_class: type[hf.PreTrainedConfig]
    config: dict[str, Any]
    head: str
    layers: tuple[str, ...]
    base_class: type[PreTrainedModel]
    other_class: type[PreTrainedModel]
    adapted: tuple[str, ...]
    batch: Callable[[int], dict[str, Any]] = field(default=_padded)
    base: Callable[[PreTrainedModel], nn.Module] = field(default=lambda model: model.base_model)

    def make(self) -> PreTrainedModel:
        """Always the same model, in evaluation mode."""
        torch.manual_seed(0)
        return self.model_class(self.config_class(**self.config)).eval()


_BERT_LAYERS = ("*intermediate.dense", "*.query", "*attention.self", "*encoder.layer.0")
_LLAMA_LAYERS = ("*mlp.down_proj", "*.q_proj", "*self_attn", "*mlp")
_LLAMA = (hf.LlamaForCausalLM, hf.LlamaConfig)

KINDS: dict[str, Kind] = {
    "bert": Kind(
        *(hf.BertForSequenceClassification, hf.BertConfig, _SIZES, "classifier", _BERT_LAYERS),
        *(hf.BertModel, hf.BertForTokenClassification, ("query", "value", "dense")),
    ),
    "bert_qa": Kind(
        *(hf.BertForQuestionAnswering, hf.BertConfig, _SIZES | {"num_hidden_layers": 2}, "qa_outputs", _BERT_LAYERS),
        *(hf.BertModel, hf.BertForSequenceClassification, ("query", "value")),
    ),
    "roberta": Kind(
        *(hf.RobertaForSequenceClassification, hf.RobertaConfig, _SIZES | {"pad_token_id": 0}),
        *("classifier.out_proj", (*_BERT_LAYERS, "classifier"), hf.RobertaModel, hf.RobertaForQuestionAnswering),
        ("query", "key"),
    ),
    "deberta": Kind(
        *(
            hf.DebertaV2ForSequenceClassification,
            hf.DebertaV2Config,
            _SIZES | _DEBERTA,
            "classifier",
            _BERT_LAYERS[0:1],
        ),
        *(hf.DebertaV2Model, hf.DebertaV2ForTokenClassification, ("query_proj", "value_proj")),
    ),
    "gpt2": Kind(
        *(hf.GPT2LMHeadModel, hf.GPT2Config, _GPT2 | _SPECIAL, "lm_head", ("*.c_attn", "*mlp.c_proj", "*attn")),
        *(hf.GPT2Model, hf.GPT2ForSequenceClassification, ("c_attn",), _causal),
    ),
    "llama": Kind(
        *(*_LLAMA, _SIZES | _SPECIAL | {"tie_word_embeddings": False}, "lm_head", _LLAMA_LAYERS),
        *(hf.LlamaModel, hf.LlamaForSequenceClassification, ("q_proj", "down_proj"), _causal),
    ),
    "llama_tied": Kind(
        *(*_LLAMA, _SIZES | _SPECIAL | {"tie_word_embeddings": True}, "lm_head", _LLAMA_LAYERS),
        *(hf.LlamaModel, hf.LlamaForSequenceClassification, ("q_proj", "down_proj"), _causal),
    ),
    "t5": Kind(
        *(hf.T5ForConditionalGeneration, hf.T5Config, _T5 | _SPECIAL | {"decoder_start_token_id": 0}, "lm_head"),
        *(("*DenseReluDense.wo", "encoder*.q", "decoder"), hf.T5Model, hf.T5EncoderModel, ("q", "wo"), _translation),
        lambda model: model.encoder,
    ),
    "vit": Kind(
        *(hf.ViTForImageClassification, hf.ViTConfig, _SIZES | {"image_size": 8, "patch_size": 4}, "classifier"),
        *(("*fc1", "*projection"), hf.ViTModel, hf.ViTForMaskedImageModeling, ("fc1",), _images),
    ),
}
