"""Frozen clips of activations in checkpoints of format version 1, other than as golden files have them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertForQuestionAnswering, BertForSequenceClassification, BertModel

import octav_hf  # noqa: F401  # registers the quantization method
from tests.frozen_activations import frozen_activations
from tests.golden.make import HERE

LAYER = "bert.encoder.layer.0.attention.self.query"


def copy_of(case: str, folder: Path, **changes: Any) -> Path:
    """A golden checkpoint of version 1 with these entries of ``activation_clips``."""
    shutil.copytree(HERE / "v1" / case, folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["activation_clips"] |= changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_other_classes_get_the_clips_of_their_modules(tmp_path: Path) -> None:
    folder = copy_of("training_4bit_frozen", tmp_path / "v1")
    whole = BertForQuestionAnswering.from_pretrained(folder)
    encoder = BertModel.from_pretrained(folder, add_pooling_layer=False)
    assert frozen_activations(encoder) == frozen_activations(whole.bert)
    other = BertForSequenceClassification.from_pretrained(folder)
    assert frozen_activations(other.bert.encoder) == frozen_activations(whole.bert.encoder)
    assert not other.classifier.input_quantizer.is_frozen


@pytest.mark.parametrize(("dtype", "kept"), [("bfloat16", "float32"), ("float64", "float64")])
def test_clips_have_the_dtype_of_statistics(tmp_path: Path, dtype: str, kept: str) -> None:
    folder = copy_of("training_4bit_frozen", tmp_path / "v1", qa_outputs={"input": {"signed": True, "clips": [1 / 3]}})
    model = BertForQuestionAnswering.from_pretrained(folder, dtype=getattr(torch, dtype))
    clips = model.qa_outputs.input_quantizer.clips
    assert clips.tolist() == torch.tensor([1 / 3], dtype=getattr(torch, kept)).tolist()
    model.save_pretrained(tmp_path / "v2")
    again = BertForQuestionAnswering.from_pretrained(tmp_path / "v2", dtype=getattr(torch, dtype))
    assert frozen_activations(again) == frozen_activations(model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({LAYER: {"query": {"signed": True, "clips": [1.0]}}}, r"\['query'\] is not a quantized activation of Bert"),
        ({"bert.encoder": {"input": {"signed": True, "clips": [1.0]}}}, "is not a quantized activation of Bert"),
        (
            {LAYER: {"input": {"signed": False, "lowest": -0.1, "clips": [1.0]}}},
            rf"\['{LAYER}'\]\['input'\] have an offset.*calibrate_octav",
        ),
        (
            {LAYER.removesuffix(".query"): {"query": {"signed": True, "clips": [[1.0, 2.0]]}}},
            r"\['query'\] have the shape \(1, 2\)",
        ),
    ],
    ids=["operand", "module", "asymmetric", "granularity"],
)
def test_clips_that_do_not_fit_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    folder = copy_of("training_4bit_frozen", tmp_path / "v1", **changes)
    with pytest.raises(ValueError, match=message):
        BertForQuestionAnswering.from_pretrained(folder)


def test_packed_files_have_their_own_record_of_the_clips(tmp_path: Path) -> None:
    folder = copy_of(
        "packed_3bit_bfloat16_frozen", tmp_path / "v1", qa_outputs={"input": {"signed": True, "clips": [9.0]}}
    )
    with pytest.raises(ValueError, match="was written with activation_clips=.*restore the config.json"):
        BertForQuestionAnswering.from_pretrained(folder)
