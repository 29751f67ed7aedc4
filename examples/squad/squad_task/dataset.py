"""Questions in the official SQuAD JSON layout, as a checked `datasets.Dataset`.

Every dataset from this file has the columns `id`, `title`, `context`, `question` (strings) and `answers`
(`{"text": list[str], "answer_start": list[int]}`, character offsets into `context`), and each answer text is checked to
be at its offset: a wrong offset would silently train the model on wrong tokens.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, List, Value, load_dataset

FEATURES = Features(
    {
        "id": Value("string"),
        "title": Value("string"),
        "context": Value("string"),
        "question": Value("string"),
        "answers": {"text": List(Value("string")), "answer_start": List(Value("int64"))},
    }
)
_NOT_SQUAD = "Give a file in the official SQuAD layout: data[].paragraphs[].qas[], with id, question and answers[]."


def read_squad_file(path: str | Path, allow_no_answer: bool = False) -> Dataset:
    """Read one SQuAD v1.1 or v2.0 file.

    Args:
        path: a JSON file laid out as `data[].paragraphs[].qas[].answers[]`.
        allow_no_answer: accept questions without an answer (SQuAD v2.0); otherwise they are an error.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not SQuAD JSON, has no question, repeats an id, marks a question with answers as
            impossible, or has an answer that is not at its `answer_start`. The message names file and question.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}. Give the path of a SQuAD JSON file.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a JSON file ({error}). {_NOT_SQUAD}") from error
    rows = list(_rows(content, str(path)))
    check_rows(rows, str(path), allow_no_answer)
    return Dataset.from_list(rows, features=FEATURES)


def load_squad_dataset(name: str, split: str, config_name: str | None = None, allow_no_answer: bool = False) -> Dataset:
    """Load a split of a dataset by name or folder with `datasets.load_dataset`, with the checks of a file.

    Raises:
        ValueError: a column is missing or has another type, or a row fails a check of `read_squad_file`.
    """
    dataset = load_dataset(name, config_name, split=split)
    missing = [column for column in ("id", "context", "question", "answers") if column not in dataset.column_names]
    if missing:
        raise ValueError(
            f"Dataset {name!r}, split {split!r}, has no column {', '.join(missing)} (it "
            f"has {', '.join(dataset.column_names)}). Use one with SQuAD's columns, or --train_file/--validation_file."
        )
    if "title" not in dataset.column_names:
        dataset = dataset.add_column("title", [""] * len(dataset))
    try:
        dataset = dataset.select_columns(list(FEATURES)).cast(FEATURES)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"Dataset {name!r}, split {split!r}, does not have SQuAD's column types: answers must be "
            f'{{"text": list of strings, "answer_start": list of integers}}, the other columns strings ({error}).'
        ) from error
    check_rows(dataset, f"dataset {name!r}, split {split!r}", allow_no_answer)
    return dataset


def sample(examples: Dataset, count: int | None, seed: int) -> Dataset:
    """`count` rows drawn with `seed`; all rows in order if `count` is None or not smaller."""
    if count is None or count >= len(examples):
        return examples
    return examples.shuffle(seed=seed).select(range(count))


def check_rows(rows: Iterable[Any], source: str, allow_no_answer: bool) -> None:
    """Raise `ValueError` for the first row that cannot be trained on or scored; the message contains `source`."""
    seen: set[str] = set()
    for row in rows:
        where = f"{source}, question {row['id']!r}"
        if row["id"] in seen:
            raise ValueError(f"{where}: the id occurs twice. Give every question an id of its own.")
        seen.add(row["id"])
        texts, starts = row["answers"]["text"], row["answers"]["answer_start"]
        if len(texts) != len(starts):
            raise ValueError(f"{where}: {len(texts)} answer texts but {len(starts)} values of answer_start.")
        if not texts and not allow_no_answer:
            raise ValueError(
                f"{where}: it has no answer. Pass --version_2_with_negative for SQuAD v2.0 data, or remove it."
            )
        for text, start in zip(texts, starts, strict=True):
            if not text or not 0 <= start <= len(row["context"]) - len(text):
                raise ValueError(
                    f"{where}: answer {text!r} at answer_start {start} is empty or reaches outside the context of "
                    f"{len(row['context'])} characters. Correct the offset or remove the question."
                )
            found = row["context"][start : start + len(text)]
            if found != text:
                raise ValueError(
                    f"{where}: answer_start {start} points at {found!r}, not at the answer {text!r}. Correct the "
                    f"offset (characters, not bytes) or remove the question."
                )
    if not seen:
        raise ValueError(f"{source} holds no question. {_NOT_SQUAD}")


def _rows(content: Any, source: str) -> Iterable[dict[str, Any]]:
    articles = _get(content, "data", list, source)
    for a, article in enumerate(articles):
        paragraphs = _get(article, "paragraphs", list, f"{source}, data[{a}]")
        for p, paragraph in enumerate(paragraphs):
            where = f"{source}, data[{a}].paragraphs[{p}]"
            context = _get(paragraph, "context", str, where)
            for q, qa in enumerate(_get(paragraph, "qas", list, where)):
                identifier = _get(qa, "id", str, f"{where}.qas[{q}]")
                where_qa = f"{source}, question {identifier!r}"
                answers = _get(qa, "answers", list, where_qa)
                if answers and qa.get("is_impossible", False):
                    raise ValueError(f"{where_qa}: is_impossible is true, yet it has answers. Correct one of the two.")
                yield {
                    "id": identifier,
                    "title": article.get("title", ""),
                    "context": context,
                    "question": _get(qa, "question", str, where_qa),
                    "answers": {
                        "text": [_get(answer, "text", str, where_qa) for answer in answers],
                        "answer_start": [_get(answer, "answer_start", int, where_qa) for answer in answers],
                    },
                }


def _get(node: Any, key: str, kind: type, where: str) -> Any:
    if not isinstance(node, dict) or key not in node:
        raise ValueError(f"{where} is not SQuAD JSON: an object with the key {key!r} is expected. {_NOT_SQUAD}")
    # bool is a subclass of int, but `true` is not an offset
    if not isinstance(node[key], kind) or isinstance(node[key], bool):
        raise ValueError(
            f"{where} is not SQuAD JSON: {key!r} should be of type {kind.__name__}, not "
            f"{type(node[key]).__name__}. {_NOT_SQUAD}"
        )
    return node[key]
