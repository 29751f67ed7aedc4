"""A model sharded by FSDP2 trains like an unsharded one, and its gathered weights give both forms of checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import BertForQuestionAnswering

from octav_hf import OctavConfig, apply_octav, pack_octav
from octav_hf.conversion.record import recorded_config

from .conftest import Run
from .scenarios import batch, bert

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("embedding_bits", [None, 8])
def test_it_trains_as_a_whole_model(succeed: Run, embedding_bits: int | None) -> None:
    config = {"activation_bits": 8, "embedding_bits": embedding_bits, "sync_activation_clips": True}
    (alone,) = succeed("train_sharded", 1, config=config)
    ranks = succeed("train_sharded", 2, config=config)
    losses = torch.stack([rank["losses"] for rank in ranks]).mean(dim=0)
    torch.testing.assert_close(losses, alone["losses"])
    for rank in ranks:
        torch.testing.assert_close(rank["clips"], alone["clips"])
    full, nothing = (rank["weights"] for rank in ranks)
    assert nothing == {}
    torch.testing.assert_close(dict(full), dict(alone["weights"]))


def test_it_is_gathered_saved_reloaded_and_packed(succeed: Run, tmp_path: Path) -> None:
    first, second = succeed("save_sharded", 2, tmp_path / "sharded")
    for rank in (first, second):
        pack, save = rank["refusals"]
        assert "encoder.layer.0.attention.self.query: its weight of shape (16, 16) is sharded; save the model" in pack
        assert "bert.embeddings.word_embeddings.weight of shape (100, 16) is sharded" in save
        assert "model.save_pretrained(folder, state_dict=state_dict)" in save
    assert not any(each["is_written"] for each in (first, second))
    whole = apply_octav(bert("float32"), OctavConfig()).eval()
    loaded = BertForQuestionAnswering.from_pretrained(tmp_path / "sharded" / "gathered")
    pack_octav(loaded).save_pretrained(tmp_path / "packed")
    packed = BertForQuestionAnswering.from_pretrained(tmp_path / "packed")
    assert recorded_config(packed).packed
    with torch.no_grad():
        expected = whole(**batch()).start_logits
        assert torch.equal(loaded(**batch()).start_logits, expected)
        assert torch.equal(packed(**batch()).start_logits, expected)
