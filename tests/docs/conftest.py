"""A folder in which the pages' code runs: small models and data under the names that the pages give them."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForQuestionAnswering, BertTokenizerFast

from octav_hf import OctavConfig, apply_octav

from .table_in_page import ROOT

PARAGRAPHS = 24  # of an article, with 3 questions each; the Quickstart needs 64 questions


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``make demo`` leaves, with random models of two layers and a few of the questions."""
    folder = tmp_path_factory.mktemp("pages")
    words = []
    for name in ("train.json", "dev.json"):
        data = json.loads((ROOT / "examples/squad/data" / name).read_text(encoding="utf-8"))
        data["data"] = [data["data"][0] | {"paragraphs": data["data"][0]["paragraphs"][:PARAGRAPHS]}]
        file = folder / "examples/squad/data" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(data), encoding="utf-8")
        words += re.findall(r"\w+|[^\w\s]", file.read_text(encoding="utf-8").lower())
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(set(words))]
    tokenizer = BertTokenizerFast(vocab={word: number for number, word in enumerate(vocabulary)})
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    model = BertForQuestionAnswering(BertConfig(vocab_size=len(vocabulary), max_position_embeddings=128, **sizes))
    for name in ("fp32-seed0", "dynamic-octav-4bit-seed0"):
        if name != "fp32-seed0":
            apply_octav(model, OctavConfig())
        model.save_pretrained(folder / "runs/demo" / name)
        tokenizer.save_pretrained(folder / "runs/demo" / name)
    return folder


@pytest.fixture
def workspace(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the template, which is the current folder. Nothing is compiled for so little data."""
    monkeypatch.setenv("OCTAV_HF_COMPILE", "0")
    shutil.copytree(template, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path
