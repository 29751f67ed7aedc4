"""Token windows: every label points at the answer, and no part of a context is lost."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from squad_files import CONTEXT, DATA, examples
from squad_task.features import Windows, evaluation_features, training_batch, training_features
from squad_task.scores import normalize
from transformers import BatchEncoding, PreTrainedTokenizerBase

SHORT = Windows(max_seq_length=128, doc_stride=32)


@pytest.mark.parametrize("side", ["left", "right"])
def test_labels_decode_to_the_answer(dev_examples: Dataset, tokenizer: PreTrainedTokenizerBase, side: str) -> None:
    tokenizer.padding_side = side
    features = training_features(dev_examples, tokenizer, SHORT)
    assert len(features) == len(dev_examples)  # each fits into one window
    for example, feature in zip(dev_examples, features, strict=True):
        assert len(feature["input_ids"]) == 128
        answer = feature["input_ids"][feature["start_positions"] : feature["end_positions"] + 1]
        assert normalize(tokenizer.decode(answer)) == normalize(example["answers"]["text"][0])


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    length=st.integers(26, 60),
    stride=st.integers(0, 12),
    row=st.integers(0, 335),
    side=st.sampled_from(["left", "right"]),
)
def test_windows(
    dev_examples: Dataset, tokenizer: PreTrainedTokenizerBase, length: int, stride: int, row: int, side: str
) -> None:
    tokenizer.padding_side = side
    windows = Windows(length, stride, max_query_length=10)
    one = dev_examples.select([row])
    answer, start = one[0]["answers"]["text"][0], one[0]["answers"]["answer_start"][0]
    train, dev = training_features(one, tokenizer, windows), evaluation_features(one, tokenizer, windows)
    covered: set[int] = set()
    for label, feature in zip(train, dev, strict=True):
        assert label["input_ids"] == feature["input_ids"]
        assert len(feature["input_ids"]) == len(feature["offset_mapping"]) == length
        assert feature["input_ids"][feature["null_index"]] == tokenizer.cls_token_id
        spans = [offset for offset in feature["offset_mapping"] if offset is not None]
        covered.update(i for first, last in spans for i in range(first, last))
        if spans[0][0] <= start and start + len(answer) <= spans[-1][1]:
            first = feature["offset_mapping"][label["start_positions"]][0]
            last = feature["offset_mapping"][label["end_positions"]][1]
            assert one[0]["context"][first:last] == answer
        else:
            assert label["start_positions"] == label["end_positions"] == feature["null_index"]
    assert covered == {i for i, character in enumerate(one[0]["context"]) if not character.isspace()}


def test_neighbouring_windows_share_doc_stride_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    one = examples(" ".join(["word"] * 50), "what?", "word")
    features = evaluation_features(one, tokenizer, Windows(max_seq_length=25, doc_stride=7))
    spans = [[tuple(offset) for offset in row if offset is not None] for row in features["offset_mapping"]]
    assert [len(span) for span in spans[:-1]] == [20] * (len(spans) - 1)  # 25 without question (2) and specials (3)
    assert all(a[-7:] == b[:7] for a, b in pairwise(spans))


def test_question_without_answer_is_labelled_cls(tokenizer: PreTrainedTokenizerBase) -> None:
    feature = training_features(examples(CONTEXT, "Who?"), tokenizer, SHORT)[0]
    assert (feature["start_positions"], feature["end_positions"]) == (0, 0)


@pytest.mark.parametrize(
    ("answer", "tokens"),
    [("car", "Ġcar"), (" car", "Ġcar"), ("   car  ", "Ġcar"), ("red   car", "red ĠĠ Ġcar"), (" ", "<s>")],
    ids=["text", "blank", "blanks", "within", "alone"],
)
def test_labels_do_not_begin_or_end_in_blanks(
    byte_tokenizer: PreTrainedTokenizerBase, answer: str, tokens: str
) -> None:
    feature = training_features(examples("red   car  ", "red", answer), byte_tokenizer, Windows(16, 2, 4, False))[0]
    labelled = feature["input_ids"][feature["start_positions"] : feature["end_positions"] + 1]
    assert byte_tokenizer.convert_ids_to_tokens(labelled) == tokens.split()


def test_dynamic_padding_keeps_features_short(tokenizer: PreTrainedTokenizerBase) -> None:
    windows = Windows(max_seq_length=128, doc_stride=32, pad_to_max_length=False)
    feature = training_features(examples(CONTEXT, "Who?", "Egypt"), tokenizer, windows)[0]
    assert tokenizer.pad_token_id not in feature["input_ids"]


def test_long_question_is_cut_and_leading_blanks_do_not_count(tokenizer: PreTrainedTokenizerBase) -> None:
    windows = Windows(max_seq_length=64, doc_stride=8, max_query_length=4)
    feature = training_features(examples(CONTEXT, "  one two three four five six", "Egypt"), tokenizer, windows)[0]
    text = tokenizer.decode(feature["input_ids"])
    assert text.startswith("[CLS] one two three four [SEP] the nile")


def test_question_without_room_names_it(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ValueError, match="'q1' has 6 tokens.*Raise --max_seq_length"):
        training_features(examples(CONTEXT, "one two three four five six", "Egypt"), tokenizer, Windows(17, 8))
    assert len(training_features(examples(CONTEXT, "one two three four five six", "Egypt"), tokenizer, Windows(18, 8)))


def test_a_context_whose_end_is_in_no_window_is_refused(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As tokenizers 0.23.1 and 0.23.2 leave out the end of a context that is longer than a window."""
    whole = type(tokenizer).__call__

    def without_the_end(self: Any, text: Any, text_pair: list[str] | None = None, **options: Any) -> BatchEncoding:
        return whole(self, text, text_pair and [context[:-5] for context in text_pair], **options)

    long, windows = "one two three four five " * 9 + "last", Windows(32, 8)
    monkeypatch.setattr(type(tokenizer), "__call__", without_the_end)
    for make in (training_features, evaluation_features):
        with pytest.raises(RuntimeError, match=r"end at character 215 of 220 of its context: tokenizers \d"):
            make(examples(long, "Who?", "one"), tokenizer, windows)
        assert len(make(examples(long + " \n  \n", "Who?", "last"), tokenizer, windows)) > 1  # only blanks are left out


def test_windows_longer_than_the_model(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ValueError, match="at most 512"):
        Windows(max_seq_length=513).check(tokenizer)


def test_dynamic_padding_on_the_left_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.padding_side = "left"
    with pytest.raises(ValueError, match="--pad_to_max_length true"):
        Windows(pad_to_max_length=False).check(tokenizer)


def test_slow_tokenizer_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    class Slow:
        is_fast = False

    with pytest.raises(ValueError, match="Slow is not a fast tokenizer"):
        Windows().check(Slow())  # type: ignore[arg-type]


def test_the_batch_is_drawn_with_the_seed(tokenizer: PreTrainedTokenizerBase) -> None:
    batches = [
        training_batch(str(DATA / "train.json"), tokenizer, Windows(64, 16, 32, False), 4, seed)["input_ids"]
        for seed in (0, 0, 1)
    ]
    assert [len(batch) for batch in batches] == [4, 4, 4]
    assert torch.equal(batches[0], batches[1])
    assert not torch.equal(batches[0], batches[2])
