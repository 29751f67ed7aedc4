"""Reading SQuAD files, and refusing other files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from squad_files import CONTEXT, examples, question, write_squad
from squad_task.dataset import FEATURES, load_squad_dataset, read_squad_file, sample


def test_v1_file(tmp_path: Path) -> None:
    dataset = read_squad_file(write_squad(tmp_path / "a.json", question("q1"), question("q2", "north")))
    assert dataset.features == FEATURES
    assert dataset["id"] == ["q1", "q2"]
    start = CONTEXT.index("north")
    assert dataset[1] == {
        "id": "q2",
        "title": "Rivers",
        "context": CONTEXT,
        "question": "Where does it end?",
        "answers": {"text": ["north"], "answer_start": [start]},
    }


def test_v2_file_has_questions_without_answers(tmp_path: Path) -> None:
    empty = {"id": "q2", "question": "Who?", "answers": [], "is_impossible": True, "plausible_answers": []}
    path = write_squad(tmp_path / "a.json", question(is_impossible=False), empty)
    assert read_squad_file(path, allow_no_answer=True)[1]["answers"] == {"text": [], "answer_start": []}
    with pytest.raises(ValueError, match="'q2'.*--version_2_with_negative"):
        read_squad_file(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{not json", "not a JSON file"),
        ("", "not a JSON file"),
        ("[]", "'data'"),
        ('{"data": {}}', "'data' should be of type list"),
        ('{"data": []}', "holds no question"),
        ('{"data": [{"title": "t"}]}', r"data\[0\].*'paragraphs'"),
        ('{"data": [{"paragraphs": [{"context": 3, "qas": []}]}]}', "'context' should be of type str"),
        ('{"data": [{"paragraphs": [{"context": "c", "qas": [{"question": "q"}]}]}]}', "'id'"),
    ],
)
def test_not_squad(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=f"a.json.*{message}"):
        read_squad_file(path)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (question(start=CONTEXT.index("Alexandria") + 1), "not at the answer 'Alexandria'"),
        (question(start=len(CONTEXT)), "reaches outside"),
        (question(start=-5), "reaches outside"),
        (question(text="", start=0), "empty"),
        (question() | {"answers": [{"text": "Alexandria"}]}, "'answer_start'"),
        (question() | {"answers": [{"text": "Alexandria", "answer_start": "40"}]}, "of type int"),
        (question() | {"answers": []}, "no answer"),
        (question(is_impossible=True), "is_impossible"),
    ],
)
def test_bad_answers_name_the_question(tmp_path: Path, bad: dict[str, Any], message: str) -> None:
    path = write_squad(tmp_path / "a.json", question("fine"), bad | {"id": "bad-one"})
    with pytest.raises(ValueError, match=f"a.json.*'bad-one'.*{message}"):
        read_squad_file(path)


def test_repeated_id(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'q1'.*occurs twice"):
        read_squad_file(write_squad(tmp_path / "a.json", question(), question()))


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere.json"):
        read_squad_file(tmp_path / "nowhere.json")


def test_named_dataset(tmp_path: Path) -> None:
    rows = examples(CONTEXT, "Where?", "Alexandria").remove_columns("title").add_column("extra", [1])
    rows.to_parquet(tmp_path / "train.parquet")
    dataset = load_squad_dataset(str(tmp_path), "train")
    assert dataset.features == FEATURES
    assert dataset[0]["answers"]["text"] == ["Alexandria"]


def test_named_dataset_with_other_columns(tmp_path: Path) -> None:
    Dataset.from_dict({"text": ["a"]}).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match="no column id, context, question, answers"):
        load_squad_dataset(str(tmp_path), "train")


def test_sample_depends_on_the_seed_alone() -> None:
    rows = Dataset.from_dict({"id": [str(i) for i in range(100)]})
    assert sample(rows, 10, 0)["id"] == sample(rows, 10, 0)["id"] != sample(rows, 10, 1)["id"]
    assert sample(rows, None, 0)["id"] == sample(rows, 100, 0)["id"] == rows["id"]


@pytest.mark.needs_shared
def test_real_dev_set_counts(shared_squad: Path) -> None:
    dataset = read_squad_file(shared_squad / "dev-v1.1.json")
    assert len(dataset) == 10_570
    assert len(set(dataset["context"])) == 2_067
