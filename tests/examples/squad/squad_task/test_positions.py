"""The longest input, compared with running a model on it and on a longer one."""

from __future__ import annotations

import pytest
import torch
from squad_task.features import Windows
from squad_task.positions import max_positions
from transformers import (
    MODEL_FOR_QUESTION_ANSWERING_MAPPING,
    BartConfig,
    BertConfig,
    CamembertConfig,
    DebertaV2Config,
    DistilBertConfig,
    GPT2Config,
    GPTJConfig,
    LlamaConfig,
    MPNetConfig,
    NystromformerConfig,
    PreTrainedConfig,
    ResNetConfig,
    RobertaConfig,
    T5Config,
    XLNetConfig,
)

ENCODER = {
    "vocab_size": 20,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 8,
    "max_position_embeddings": 24,
}
POSITIONS = {"max_position_embeddings": 24}
BART = {"d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_ffn_dim": 8}
GPT = {"n_embd": 8, "n_layer": 1, "n_head": 2, "vocab_size": 20, "n_positions": 24}
T5 = {"d_model": 8, "num_layers": 1, "num_heads": 2, "d_ff": 8, "d_kv": 4, "vocab_size": 20}
CONFIGS: dict[str, tuple[PreTrainedConfig, int | None]] = {
    "bert": (BertConfig(**ENCODER), 24),
    "distilbert": (DistilBertConfig(vocab_size=20, dim=8, n_layers=1, n_heads=2, hidden_dim=8, **POSITIONS), 24),
    "roberta": (RobertaConfig(**ENCODER, pad_token_id=1), 22),
    "camembert": (CamembertConfig(**ENCODER, pad_token_id=3), 20),
    "mpnet": (MPNetConfig(**ENCODER), 22),
    "deberta": (DebertaV2Config(**ENCODER), 24),
    "deberta without positions": (
        DebertaV2Config(**ENCODER, position_biased_input=False, relative_attention=True),
        None,
    ),
    "nystromformer": (NystromformerConfig(**ENCODER, num_landmarks=4, segment_means_seq_len=24), 24),
    "bart": (BartConfig(**BART, vocab_size=20, encoder_ffn_dim=8, decoder_attention_heads=2, **POSITIONS), 24),
    "gpt2": (GPT2Config(**GPT), 24),
    "gptj": (GPTJConfig(**GPT, rotary_dim=4), 24),
    "llama": (LlamaConfig(**ENCODER), None),
    "t5": (T5Config(**T5, decoder_start_token_id=0), None),
    "xlnet": (XLNetConfig(vocab_size=20, d_model=8, n_layer=1, n_head=2, d_inner=8), None),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_longest_input_and_no_longer_one(name: str) -> None:
    config, limit = CONFIGS[name]
    torch.manual_seed(0)
    state = torch.get_rng_state()
    assert max_positions(config) == limit
    assert torch.equal(torch.get_rng_state(), state)
    model = MODEL_FOR_QUESTION_ANSWERING_MAPPING[type(config)](config).eval()

    def run(length: int) -> None:
        ids = torch.full((1, length), 5)
        with torch.no_grad():
            model(input_ids=ids, attention_mask=torch.ones_like(ids))

    run(limit or 96)
    if limit is not None:
        with pytest.raises((IndexError, RuntimeError)):
            run(limit + 1)


def test_windows_longer_than_the_positions() -> None:
    config = CONFIGS["roberta"][0]
    Windows(max_seq_length=22).check_model(config)
    with pytest.raises(
        ValueError, match="--max_seq_length 23 exceeds the 22 tokens that the teacher takes.*at most 22"
    ):
        Windows(max_seq_length=23).check_model(config, "teacher")


def test_a_config_without_a_question_answering_model_is_left_to_transformers() -> None:
    assert max_positions(ResNetConfig()) is None
