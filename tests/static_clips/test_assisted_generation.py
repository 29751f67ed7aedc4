"""Assisted generation, where a model checks several proposed tokens at a time, against one token at a time."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from octav_hf import OctavConfig, apply_octav, calibrate_octav


def llama(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def test_an_assistant_changes_the_text_unless_clips_are_frozen() -> None:
    model, assistant = apply_octav(llama(0), OctavConfig()), llama(1)
    ids = torch.randint(1, 32, (4, 24), generator=torch.Generator().manual_seed(0))
    prompt = {"input_ids": ids[:1, :8], "attention_mask": torch.ones(1, 8), "max_new_tokens": 6, "do_sample": False}

    def assisted_is_greedy() -> bool:
        return torch.equal(model.generate(**prompt, assistant_model=assistant), model.generate(**prompt))

    assert not assisted_is_greedy()  # a clip of several tokens is not that of each of them
    calibrate_octav(model, [{"input_ids": ids}], progress_bar=False)
    assert assisted_is_greedy()
