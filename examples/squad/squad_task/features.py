"""Questions and contexts as token windows: labels for training, character offsets for evaluation.

A context longer than the model's window becomes several features that overlap by `doc_stride` tokens. The question
comes first; only the context is split.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from datasets import Dataset
from transformers import BatchEncoding, DataCollatorWithPadding, PreTrainedTokenizerBase

from squad_task.dataset import read_squad_file, sample

if TYPE_CHECKING:  # these import torch, which evaluate_onnx.py must not
    from torch import Tensor
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class Windows:
    """How contexts are split into windows; lengths are in tokens.

    Attributes:
        max_seq_length: length of a feature, including special tokens.
        doc_stride: tokens that two neighbouring windows of a context share.
        max_query_length: longer questions are truncated.
        pad_to_max_length: pad every feature to `max_seq_length`; otherwise the collator pads to the longest of a batch.
    """

    max_seq_length: int = 384
    doc_stride: int = 128
    max_query_length: int = 64
    pad_to_max_length: bool = True

    def check(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raise `ValueError` if `tokenizer` cannot produce these windows."""
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(
                f"{type(tokenizer).__name__} is not a fast tokenizer and gives no character offsets. "
                f"Use a model whose folder has a tokenizer.json."
            )
        self._check_length(tokenizer.model_max_length, "model")
        if self.doc_stride < 0 or self.max_query_length < 1:
            raise ValueError(
                f"--doc_stride {self.doc_stride} must be at least 0 and --max_query_length "
                f"{self.max_query_length} at least 1."
            )
        # padding a batch on the left would shift the stored token positions
        if tokenizer.padding_side == "left" and not self.pad_to_max_length:
            raise ValueError("This tokenizer pads on the left: pass --pad_to_max_length true.")

    def check_model(self, config: PreTrainedConfig, name: str = "model") -> None:
        """Raise `ValueError` if a model with `config` has too few positions; the message calls it `name`."""
        from squad_task.positions import max_positions  # imports torch

        limit = max_positions(config)
        if limit is not None:
            self._check_length(limit, name)

    def _check_length(self, limit: int, name: str) -> None:
        if self.max_seq_length > limit:
            raise ValueError(
                f"--max_seq_length {self.max_seq_length} exceeds the {limit} tokens that the {name} takes. "
                f"Lower --max_seq_length to at most {limit}."
            )


def training_features(examples: Dataset, tokenizer: PreTrainedTokenizerBase, windows: Windows) -> Dataset:
    """Tokenize for training.

    Args:
        examples: columns as in `squad_task.dataset`; the first answer of a question is the label.

    Returns:
        One row per window: the tokenizer's model inputs, and `start_positions`, `end_positions` (int): the first and
        last token of the answer, or the CLS token for both if the window does not contain the whole answer.

    Raises:
        ValueError: the tokenizer is not fast, or a question leaves no room for the context.
        RuntimeError: the installed version of tokenizers leaves out the end of a context.
    """
    windows.check(tokenizer)

    def tokenize(batch: dict[str, list[Any]]) -> dict[str, Any]:
        encoded = _encode(batch, tokenizer, windows)
        positions = [
            _answer_tokens(encoded, feature, batch["answers"][example], tokenizer)
            for feature, example in enumerate(encoded["overflow_to_sample_mapping"])
        ]
        columns = _model_inputs(encoded)
        columns["start_positions"] = [start for start, _ in positions]
        columns["end_positions"] = [end for _, end in positions]
        return columns

    return examples.map(tokenize, batched=True, remove_columns=examples.column_names, desc="Tokenizing train questions")


def evaluation_features(examples: Dataset, tokenizer: PreTrainedTokenizerBase, windows: Windows) -> Dataset:
    """Tokenize for evaluation.

    Returns:
        One row per window: the tokenizer's model inputs, `example_id`, `null_index` (position of the token that means
        "no answer"), and `offset_mapping`: `[start, end]` of each token in characters of the context, or None outside
        the context.

    Raises:
        ValueError, RuntimeError: as `training_features`.
    """
    windows.check(tokenizer)

    def tokenize(batch: dict[str, list[Any]]) -> dict[str, Any]:
        encoded = _encode(batch, tokenizer, windows)
        columns = _model_inputs(encoded)
        columns["example_id"] = [batch["id"][example] for example in encoded["overflow_to_sample_mapping"]]
        features = range(len(columns["example_id"]))
        columns["null_index"] = [_null_index(encoded, feature, tokenizer) for feature in features]
        columns["offset_mapping"] = [
            [
                list(offset) if part == 1 else None
                for offset, part in zip(encoded["offset_mapping"][feature], encoded.sequence_ids(feature), strict=True)
            ]
            for feature in features
        ]
        return columns

    return examples.map(tokenize, batched=True, remove_columns=examples.column_names, desc="Tokenizing dev questions")


def training_batch(
    path: str, tokenizer: PreTrainedTokenizerBase, windows: Windows, size: int, seed: int
) -> dict[str, Tensor]:
    """`size` windows drawn with `seed`, padded to the longest; questions without an answer are allowed."""
    examples = sample(read_squad_file(path, allow_no_answer=True), size, seed)
    features = sample(training_features(examples, tokenizer, windows), size, seed)
    return dict(DataCollatorWithPadding(tokenizer)([features[i] for i in range(len(features))]))


def _encode(batch: dict[str, list[Any]], tokenizer: PreTrainedTokenizerBase, windows: Windows) -> BatchEncoding:
    # some tokenizers keep leading blanks of a question as tokens
    questions = [question.lstrip() for question in batch["question"]]
    encoded = tokenizer(questions, add_special_tokens=False, return_offsets_mapping=True)
    needed = tokenizer.num_special_tokens_to_add(pair=True) + windows.doc_stride + 1
    for i, offsets in enumerate(encoded["offset_mapping"]):
        if len(offsets) > windows.max_query_length:
            questions[i] = questions[i][: offsets[windows.max_query_length - 1][1]]
        length = min(len(offsets), windows.max_query_length)
        if length + needed > windows.max_seq_length:
            raise ValueError(
                f"Question {batch['id'][i]!r} has {length} tokens; with {needed - windows.doc_stride - 1} special "
                f"tokens and --doc_stride {windows.doc_stride} it leaves no room for the context in --max_seq_length "
                f"{windows.max_seq_length}. Raise --max_seq_length, or lower --doc_stride or --max_query_length."
            )
    encoded = tokenizer(
        questions,
        batch["context"],
        truncation="only_second",
        max_length=windows.max_seq_length,
        stride=windows.doc_stride,
        padding="max_length" if windows.pad_to_max_length else False,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
        return_attention_mask=True,
    )
    _check_whole_contexts(encoded, batch, tokenizer)
    return encoded


def _check_whole_contexts(
    encoded: BatchEncoding, batch: dict[str, list[Any]], tokenizer: PreTrainedTokenizerBase
) -> None:
    # tokenizers 0.23.1 and 0.23.2 stop before the end of a context that has several windows
    covered = [0] * len(batch["context"])
    for feature, example in enumerate(encoded["overflow_to_sample_mapping"]):
        parts = zip(encoded["offset_mapping"][feature], encoded.sequence_ids(feature), strict=True)
        covered[example] = max([covered[example], *(end for (_, end), part in parts if part == 1)])
    for identifier, context, end in zip(batch["id"], batch["context"], covered, strict=True):
        if not context[end:].strip():
            continue
        offsets = tokenizer(context, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        if offsets and offsets[-1][1] > end:
            raise RuntimeError(
                f"The windows of question {identifier!r} end at character {end} of {offsets[-1][1]} of its context: "
                f"tokenizers {version('tokenizers')} leaves the rest out. Install tokenizers 0.22.2 or 0.23.3."
            )


def _model_inputs(encoded: BatchEncoding) -> dict[str, Any]:
    return {k: v for k, v in encoded.items() if k not in ("overflow_to_sample_mapping", "offset_mapping")}


def _null_index(encoded: BatchEncoding, feature: int, tokenizer: PreTrainedTokenizerBase) -> int:
    ids = encoded["input_ids"][feature]
    if tokenizer.cls_token_id is not None and tokenizer.cls_token_id in ids:
        return ids.index(tokenizer.cls_token_id)
    # without CLS, the first token that is not padding
    return encoded["attention_mask"][feature].index(1)


def _answer_tokens(
    encoded: BatchEncoding, feature: int, answers: dict[str, list[Any]], tokenizer: PreTrainedTokenizerBase
) -> tuple[int, int]:
    null = _null_index(encoded, feature, tokenizer)
    if not answers["text"]:
        return null, null
    text = answers["text"][0]
    # blanks around the answer may be separate tokens, or belong to no token
    first = answers["answer_start"][0] + len(text) - len(text.lstrip())
    last = first + len(text.strip())
    offsets = encoded["offset_mapping"][feature]
    context = [i for i, part in enumerate(encoded.sequence_ids(feature)) if part == 1]
    if not context or offsets[context[0]][0] > first or offsets[context[-1]][1] < last:
        return null, null
    # tokens that share a character with the answer
    inside = [i for i in context if max(offsets[i][0], first) < min(offsets[i][1], last)]
    return (inside[0], inside[-1]) if inside else (null, null)
