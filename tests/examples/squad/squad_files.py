"""The generated questions, and small SQuAD files and datasets that the tests build on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from datasets import Dataset
from squad_task.dataset import FEATURES

DATA = Path(__file__).resolve().parents[3] / "examples" / "squad" / "data"
CONTEXT = "The Nile flows north. Its mouth is near Alexandria, a port in Egypt."


def question(identifier: str = "q1", text: str = "Alexandria", start: int | None = None, **more: Any) -> dict[str, Any]:
    """One `qas` entry about CONTEXT; `start` None means the right offset."""
    start = CONTEXT.index(text) if start is None else start
    answers = [{"text": text, "answer_start": start}]
    return {"id": identifier, "question": "Where does it end?", "answers": answers, **more}


def write_squad(path: Path, *questions: dict[str, Any], context: str = CONTEXT) -> Path:
    """Write one paragraph in SQuAD layout."""
    content = {"data": [{"title": "Rivers", "paragraphs": [{"context": context, "qas": list(questions)}]}]}
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def examples(context: str, question: str, *answers: str) -> Dataset:
    """A row as returned by `read_squad_file`."""
    row = {
        "id": "q1",
        "title": "",
        "context": context,
        "question": question,
        "answers": {"text": list(answers), "answer_start": [context.index(answer) for answer in answers]},
    }
    return Dataset.from_list([row], features=FEATURES)
