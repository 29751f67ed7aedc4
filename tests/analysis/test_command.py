"""``octav-hf report``: from a checkpoint and a file of examples to a page, or to one line that says what is wrong."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertForQuestionAnswering, PreTrainedTokenizerFast, RobertaConfig, RobertaModel

from octav_hf import OctavConfig, Report, apply_octav
from octav_hf.cli import main
from octav_hf.cli.text_batches import text_batches
from tests.architectures.models import ARCHITECTURES

MakeBert = Callable[..., BertForQuestionAnswering]

WORDS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *(f"w{number}" for number in range(60))]
IDS = {word: number for number, word in enumerate(WORDS)}


@pytest.fixture
def checkpoint(small_bert: MakeBert, tmp_path: Path) -> Path:
    """A quantized checkpoint with a tokenizer of words."""
    folder = tmp_path / "checkpoint"
    apply_octav(small_bert(num_hidden_layers=1), OctavConfig()).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel(IDS, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    special = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return folder


def squad(*questions: tuple[str, str]) -> dict[str, Any]:
    """SQuAD's JSON of questions and contexts, one paragraph each."""
    paragraphs = [{"context": context, "qas": [{"question": question}]} for question, context in questions]
    return {"version": "1.1", "data": [{"title": "", "paragraphs": paragraphs}]}


def batches_of(checkpoint: Path, file: Path, max_examples: int = 64, batch_size: int = 8) -> list[dict]:
    return text_batches(
        file, checkpoint, BertForQuestionAnswering.from_pretrained(checkpoint), max_examples, batch_size
    )


def test_page_and_json_are_written(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    data, page = tmp_path / "dev.json", tmp_path / "out" / "page.html"
    data.write_text(json.dumps(squad(("w1 w2", "w3 w4 w5"), ("w6", "w7 w8"), ("w9", "w10"))))
    arguments = ["report", checkpoint, "--data", data, "--output", page, "--max-examples", "2", "--batch-size", "1"]
    assert main([str(argument) for argument in arguments]) == 0
    found = Report.load(page.with_suffix(".json"))
    assert found.batches == 2
    assert found.divergence > 0
    printed = capsys.readouterr().out
    assert printed.startswith(found.verdict)
    assert printed.endswith(f"wrote {page} and {page.with_suffix('.json')}\n")
    assert "<h1>" in page.read_text(encoding="utf-8")


def test_teacher(checkpoint: Path, small_bert: MakeBert, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    data = tmp_path / "lines.jsonl"
    data.write_text('{"text": "w1"}\n')
    small_bert(num_hidden_layers=1, seed=1).save_pretrained(tmp_path / "float")
    arguments = ["report", checkpoint, "--data", data, "--output", tmp_path / "page.html", "--teacher"]
    assert main([*map(str, arguments), str(tmp_path / "float")]) == 0
    assert Report.load(tmp_path / "page.json").compared_with == "the float model given"
    capsys.readouterr()
    assert main([*map(str, arguments), str(checkpoint)]) == 1
    assert "is quantized; --teacher is the float model" in capsys.readouterr().err


def test_questions_come_first_and_contexts_are_cut_off(checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "dev.json"
    file.write_text(json.dumps(squad(("w1 w2", " ".join(WORDS[4:])), ("w3", "w4"))))
    (batch,) = batches_of(checkpoint, file)
    first, second = batch["input_ids"].tolist()
    question = [IDS["[CLS]"], IDS["w1"], IDS["w2"], IDS["[SEP]"]]
    assert first == [*question, *(IDS[f"w{number}"] for number in range(59)), IDS["[SEP]"]]  # 64 positions
    assert second[:5] == [IDS[word] for word in ("[CLS]", "w3", "[SEP]", "w4", "[SEP]")]
    assert batch["attention_mask"].sum(dim=1).tolist() == [64, 5]
    assert all(isinstance(value, torch.Tensor) for value in batch.values())


def test_lines_of_text_and_of_pairs(checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "lines.jsonl"
    file.write_text("".join(json.dumps({"text": f"w{number}"}) + "\n\n" for number in range(5)))
    batches = batches_of(checkpoint, file, max_examples=3, batch_size=2)
    assert [batch["input_ids"][:, 1].tolist() for batch in batches] == [[IDS["w0"], IDS["w1"]], [IDS["w2"]]]
    file.write_text('{"text": "w1", "text_pair": "w2"}')
    (batch,) = batches_of(checkpoint, file)
    assert batch["input_ids"].tolist() == [[IDS[word] for word in ("[CLS]", "w1", "[SEP]", "w2", "[SEP]")]]


def test_lines_as_other_programs_write_them(checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "lines.jsonl"
    file.write_bytes('\ufeff{"text": "w1"}\r\n{"text": "w2\u2028w3\x85w4"}\r\n'.encode())
    (batch,) = batches_of(checkpoint, file)
    words = ["[CLS]", "w1", "[SEP]", "[PAD]", "[PAD]"], ["[CLS]", "w2", "w3", "w4", "[SEP]"]
    assert batch["input_ids"].tolist() == [[IDS[word] for word in row] for row in words]


def test_a_tokenizer_without_padding_uses_the_end_of_the_text(checkpoint: Path, tmp_path: Path) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(checkpoint)
    tokenizer.pad_token, tokenizer.eos_token = None, "w9"
    tokenizer.save_pretrained(checkpoint)
    file = tmp_path / "lines.jsonl"
    file.write_text('{"text": "w1 w2"}\n{"text": "w3"}\n')
    (batch,) = batches_of(checkpoint, file)
    assert batch["input_ids"][1].tolist() == [IDS[word] for word in ("[CLS]", "w3", "[SEP]", "w9")]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]


def test_encoder_decoder_models_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is an encoder-decoder model.*labels or decoder_input_ids"):
        text_batches(tmp_path / "lines.jsonl", checkpoint, ARCHITECTURES["T5"].make(), 64, 8)


def test_roberta_takes_fewer_tokens_than_it_has_positions(checkpoint: Path, tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = RobertaModel(RobertaConfig(vocab_size=len(WORDS), max_position_embeddings=34, pad_token_id=1, **sizes))
    file = tmp_path / "lines.jsonl"
    file.write_text(json.dumps({"text": "w1 " * 60}))
    (batch,) = text_batches(file, checkpoint, model, 64, 8)
    assert batch["input_ids"].shape == (1, 32)
    model(**batch)


def test_a_tokenizer_of_another_model_is_refused(checkpoint: Path, small_bert: MakeBert, tmp_path: Path) -> None:
    file, model = tmp_path / "lines.jsonl", small_bert()
    file.write_text('{"text": "w1 w59"}')
    model.resize_token_embeddings(60)
    with pytest.raises(ValueError, match=r"has token 63, and the embedding table of BertForQ.* only 60 rows"):
        text_batches(file, checkpoint, model, 64, 8)


BOTH = '{"text": "a", "text_pair": "b"}\n{"text": "a"}'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has no example; write SQuAD's JSON"),
        (b'{"data": []}', "has no example; write SQuAD's JSON"),
        (b'{"data": [{"paragraphs": [{"qas": [{"question": "q"}]}]}]}', "is not SQuAD's JSON"),
        (b'{"data": 3}', "is not SQuAD's JSON"),
        (b'{"text": "a"}\n{"sentence": "b"}', 'line 2: \'{"sentence": "b"}\' is no example'),
        (b'{"text": 3}', "line 1"),
        (b"[1, 2]", "line 1: '[1, 2]' is no example"),
        (b"question,context", "line 1: 'question,context' is no example"),
        (b"\xff\xfe", "is no UTF-8 text"),
        (b"[" * 100_000, "nested too deeply"),
        (BOTH.encode(), "line 2: either all examples have a text_pair or none"),
    ],
)
def test_data_of_another_form(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture, content: bytes, message: str
) -> None:
    data = tmp_path / "data.json"
    data.write_bytes(content)
    assert main(["report", str(checkpoint), "--data", str(data), "--output", str(tmp_path / "page.html")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize("option", ["--max-examples", "--batch-size"])
def test_numbers_below_1(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture, option: str) -> None:
    assert main(["report", str(checkpoint), "--data", str(tmp_path / "data.json"), option, "0"]) == 1
    assert f"{option} must be at least 1, got 0" in capsys.readouterr().err


def test_missing_files(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["report", str(checkpoint), "--data", str(tmp_path / "nothing.json")]) == 1
    assert "nothing.json" in capsys.readouterr().err
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "w1"}')
    for file in checkpoint.glob("tokenizer*"):
        file.unlink()
    assert main(["report", str(checkpoint), "--data", str(data), "--output", str(tmp_path / "page.html")]) == 1
    assert "has no tokenizer for the text" in capsys.readouterr().err
