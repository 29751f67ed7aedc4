"""The generated questions: reproducible, disjoint, and varied."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import generate_squad
import pytest
from generate_squad import generate
from squad_task.dataset import read_squad_file
from squad_task.names import MONTHS, NAME_WORDS
from squad_task.templates import DOMAINS

DATA = Path(generate_squad.__file__).parent / "data"


@pytest.fixture(scope="module")
def splits() -> dict[str, Any]:
    return {split: json.loads((DATA / f"{split}.json").read_text(encoding="utf-8")) for split in ("train", "dev")}


def paragraphs(split: dict[str, Any]) -> list[dict[str, Any]]:
    return [paragraph for article in split["data"] for paragraph in article["paragraphs"]]


def test_committed_files_are_those_of_seed_0(tmp_path: Path) -> None:
    generate_squad.main(["--seed", "0", "--output_dir", str(tmp_path)])
    for split in ("train", "dev"):
        assert (tmp_path / f"{split}.json").read_bytes() == (DATA / f"{split}.json").read_bytes()


def test_another_seed_gives_other_questions() -> None:
    assert generate(0, 8, 8) == generate(0, 8, 8)
    assert generate(0, 8, 8) != generate(1, 8, 8)


def test_files_are_valid_squad() -> None:
    assert 1_200 <= len(read_squad_file(DATA / "train.json")) <= 2_000
    assert 300 <= len(read_squad_file(DATA / "dev.json")) <= 400
    assert sum((DATA / f"{split}.json").stat().st_size for split in ("train", "dev")) < 1_500_000


def test_train_and_dev_share_no_paragraph_and_no_name(splits: dict[str, Any]) -> None:
    # capitals that the templates and the calendar bring along are no names
    texts = [text for domain in DOMAINS for fact in domain.facts for text in (*fact.predicates, *fact.sentences)]
    known = set(re.findall(r"[A-Z]\w+", " ".join([*texts, *(domain.name for domain in DOMAINS)])))
    known |= set(MONTHS) | {"The", "It", "They"}
    known |= {word.capitalize() for domain in DOMAINS for fact in domain.facts for word in phrase_words(fact.value)}
    known -= {word.capitalize() for word in NAME_WORDS}
    names, contexts = {}, {}
    for split, content in splits.items():
        contexts[split] = {paragraph["context"] for paragraph in paragraphs(content)}
        names[split] = set(re.findall(r"[A-Z]\w+", " ".join(contexts[split]))) - known
        assert len(names[split]) > 100
    assert not contexts["train"] & contexts["dev"]
    assert not names["train"] & names["dev"]


def phrase_words(value: Any) -> list[str]:
    return value.first.split() + value.second.split() if hasattr(value, "first") else []


def test_no_name_word_is_repeated() -> None:
    assert len(NAME_WORDS) == len(set(NAME_WORDS))


def test_some_wordings_of_questions_are_in_dev_only(splits: dict[str, Any]) -> None:
    facts = [fact for domain in DOMAINS for fact in domain.facts]
    unseen = [re.escape(wording).replace(r"\{s\}", ".+") for fact in facts for wording in fact.dev_questions]
    share = {}
    for split, content in splits.items():
        questions = [qa["question"] for paragraph in paragraphs(content) for qa in paragraph["qas"]]
        share[split] = sum(any(re.fullmatch(w, q) for w in unseen) for q in questions) / len(questions)
    assert share["train"] == 0
    assert 0.3 < share["dev"] < 0.7


def test_answers_stand_once_in_their_paragraph(splits: dict[str, Any]) -> None:
    for content in splits.values():
        for paragraph in paragraphs(content):
            for qa in paragraph["qas"]:
                assert paragraph["context"].count(qa["answers"][0]["text"]) == 1
