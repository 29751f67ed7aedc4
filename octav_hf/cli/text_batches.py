"""Batches of tokenized text from a file of examples."""

import json
import math
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .._utils.escaping import shown
from .._utils.forward_pass import Batch

_LONGEST = 512  # tokens, where neither tokenizer nor model says how many there may be
_FORMS = (
    'write SQuAD\'s JSON, {"data": [{"paragraphs": [{"context": "…", "qas": [{"question": "…"}]}]}]}, or a line of '
    'JSON for each example, {"text": "…"} or {"text": "…", "text_pair": "…"}'
)


def text_batches(path: Path, folder: Path, model: PreTrainedModel, max_examples: int, batch_size: int) -> list[Batch]:
    """The first examples of a file as batches of a model's arguments, padded to the longest of each batch.

    Args:
        path: SQuAD's JSON, of which questions and contexts are read, or JSON lines of ``text`` and maybe ``text_pair``.
        folder: with the tokenizer.
        model: the model, which may say how many tokens it takes.
        max_examples, batch_size: at least 1.

    Returns:
        Batches of ``[batch, tokens]``. An example that is too long is cut off, of a pair the longer text, of a question
        with its context the context.

    Raises:
        ValueError: the file has another form or no example, a number is below 1, the folder has no tokenizer, or one
            with more tokens than the model, or the model is an encoder-decoder, which needs the decoder's tokens too.
        OSError: the file cannot be read.
    """
    for name, value in (("--max-examples", max_examples), ("--batch-size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if model.config.is_encoder_decoder:
        raise ValueError(
            f"{folder} is an encoder-decoder model, and the examples have no tokens for its decoder; call "
            "octav_hf.report(model, batches) in Python with batches that have labels or decoder_input_ids"
        )
    examples, truncation = _examples(path)
    chosen = list(islice(examples, max_examples))
    if not chosen:
        raise ValueError(f"{path} has no example; {_FORMS}")
    tokenizer = _tokenizer(folder)
    lengths = (tokenizer.model_max_length, _most_tokens(model))
    vocabulary = getattr(model.get_input_embeddings(), "num_embeddings", math.inf)
    batches: list[Batch] = []
    for start in range(0, len(chosen), batch_size):
        texts, pairs = zip(*chosen[start : start + batch_size], strict=True)
        encoded = tokenizer(
            list(texts),
            None if pairs[0] is None else list(pairs),
            truncation=truncation,
            max_length=min(lengths),
            padding=True,
            return_tensors="pt",
        )
        highest = int(encoded["input_ids"].max())
        if highest >= vocabulary:
            raise ValueError(
                f"the tokenizer of {folder} has token {highest}, and the embedding table of {type(model).__name__} "
                f"only {vocabulary} rows; save the model's own tokenizer there"
            )
        batches.append(dict(encoded))
    return batches


def _most_tokens(model: PreTrainedModel) -> int:
    """The longest sequence that the model takes; RoBERTa counts positions from ``padding_idx + 1``."""
    positions: int = getattr(model.config, "max_position_embeddings", None) or _LONGEST
    tables = (module for name, module in model.named_modules() if name.endswith("position_embeddings"))
    unused = [table.padding_idx + 1 for table in tables if getattr(table, "padding_idx", None) is not None]
    return positions - max(unused, default=0)


def _tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(_no_tokenizer(folder, str(error))) from error
    # Without its files Transformers makes one that knows its special tokens alone.
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise ValueError(_no_tokenizer(folder, "it would have no vocabulary"))
    if tokenizer.pad_token is None:  # as of GPT-2; any token will do, because padding is masked
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _no_tokenizer(folder: Path, reason: str) -> str:
    return (
        f"{folder} has no tokenizer for the text ({reason}); save it there with tokenizer.save_pretrained, or call "
        "octav_hf.report(model, batches) in Python with batches of your own"
    )


def _examples(path: Path) -> tuple[Iterator[tuple[str, str | None]], Any]:
    """Texts with the text of the pair, and how a pair is cut off."""
    try:
        text = path.read_text(encoding="utf-8-sig")  # with or without a byte order mark
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text; {_FORMS}") from error
    try:
        whole = json.loads(text)
    except RecursionError as error:
        raise ValueError(f"{path} is nested too deeply; {_FORMS}") from error
    except ValueError:
        whole = None  # lines, perhaps
    if isinstance(whole, dict) and "data" in whole:
        return _squad(path, whole), "only_second"
    return _lines(path, text), True


def _squad(path: Path, whole: dict[str, Any]) -> Iterator[tuple[str, str]]:
    try:
        for article in whole["data"]:
            for paragraph in article["paragraphs"]:
                for question in paragraph["qas"]:
                    yield _text(question["question"]), _text(paragraph["context"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is not SQuAD's JSON ({error!r}); {_FORMS}") from error


def _lines(path: Path, text: str) -> Iterator[tuple[str, str | None]]:
    has_pairs = None
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: JSON may hold U+2028 and its like in a string
        if not line.strip():
            continue
        try:
            example = json.loads(line)
            first, second = _text(example["text"]), example.get("text_pair")
            if second is not None:
                _text(second)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: {shown(line)} is no example; {_FORMS}") from error
        if has_pairs is None:
            has_pairs = second is not None
        elif has_pairs is not (second is not None):
            raise ValueError(f"{path}, line {number}: either all examples have a text_pair or none")
        yield first, second


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{shown(value)} is no text")
    return value
