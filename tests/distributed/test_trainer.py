"""Trainer in two processes ends with the weights of one process, and writes both forms of checkpoints once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import BertForQuestionAnswering

from octav_hf import last_whole_checkpoint
from octav_hf.conversion.record import recorded_config

from .conftest import Run
from .scenarios import batch

pytestmark = pytest.mark.slow


def test_two_processes_end_as_one(succeed: Run, tmp_path: Path) -> None:
    config = {"activation_bits": 8, "sync_activation_clips": True}
    (alone,) = succeed("train_with_trainer", 1, tmp_path / "one", config=config, per_device=8)
    first, second = succeed("train_with_trainer", 2, tmp_path / "two", config=config, per_device=4)
    forms = ["trained", "packed"]
    assert first["written"] == [f"{folder}/model.safetensors" for folder in ("run/checkpoint-3", *forms)]
    assert second["written"] == []
    assert torch.equal(second["logits"], first["logits"])
    torch.testing.assert_close(first["logits"], alone["logits"])
    for form in forms:
        loaded = BertForQuestionAnswering.from_pretrained(tmp_path / "two" / form, dtype="auto")
        assert recorded_config(loaded).sync_activation_clips
        assert recorded_config(loaded).packed is (form == "packed")
        with torch.no_grad():  # not bit by bit, since the ranks' clips are of the batch of each
            torch.testing.assert_close(loaded(**batch()).start_logits, first["logits"])
    checkpoint = last_whole_checkpoint(tmp_path / "two" / "run")
    weights = BertForQuestionAnswering.from_pretrained(checkpoint, dtype="auto").state_dict()
    expected = BertForQuestionAnswering.from_pretrained(tmp_path / "two" / "trained", dtype="auto").state_dict()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


@pytest.mark.parametrize("synchronized", [False, True])
def test_the_callback_logs_what_the_first_process_measures(succeed: Run, tmp_path: Path, synchronized: bool) -> None:
    config = {"sync_activation_clips": synchronized}
    (alone,) = succeed("train_with_callback", 1, tmp_path / "one", config=config, per_device=8)
    first, second = succeed("train_with_callback", 2, tmp_path / "two", config=config, per_device=4)
    assert not [log for log in second if any(name.startswith("octav/") for name in log)]
    for step in range(3):
        assert first[step].keys() == alone[step].keys()
        assert first[step]["octav/activation_sqnr_db_mean"] == pytest.approx(
            alone[step]["octav/activation_sqnr_db_mean"],
            abs=0.5,  # of half of the batch
        )
    before_training = "octav/weight_sqnr_db_mean", "octav/weight_clipped_share_mean"
    assert {name: first[0][name] for name in before_training} == {name: alone[0][name] for name in before_training}
