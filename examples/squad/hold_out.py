"""Split a SQuAD file into its last questions, for choosing hyperparameters, and the rest, for training.

    python hold_out.py --train_file train.json --questions 2000 --output_dir data

Writes `train.json` and `choices.json`. Whole paragraphs are held out, so that no context is in both. Choices made on
`choices.json` do not use the dev set.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def main(argv: list[str] | None = None) -> None:
    """Write both files and print how many questions each has."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("--train_file", type=Path, required=True)
    parser.add_argument("--questions", type=int, default=2000, help="hold out at least this many")
    parser.add_argument("--output_dir", type=Path, required=True)
    options = parser.parse_args(argv)
    content = json.loads(options.train_file.read_text(encoding="utf-8"))
    paragraphs = [(article, paragraph) for article in content["data"] for paragraph in article["paragraphs"]]
    counts = [len(paragraph["qas"]) for _, paragraph in paragraphs]
    first = len(paragraphs)
    while sum(counts[first:]) < options.questions and first > 0:
        first -= 1
    if not 0 < first < len(paragraphs):
        parser.error(f"--questions {options.questions} of {sum(counts)} leaves nothing on one side")
    options.output_dir.mkdir(parents=True, exist_ok=True)
    for name, part in (("train", paragraphs[:first]), ("choices", paragraphs[first:])):
        text = json.dumps({**content, "data": _articles(part)})
        (options.output_dir / f"{name}.json").write_text(text, encoding="utf-8")
        print(f"{name}.json: {sum(len(paragraph['qas']) for _, paragraph in part)} questions")


def _articles(paragraphs: list[tuple[dict[str, Any], dict[str, Any]]]) -> list[dict[str, Any]]:
    """Group paragraphs by article again, with the other fields of the article."""
    articles: list[dict[str, Any]] = []
    last = None
    for article, paragraph in paragraphs:
        if article is not last:
            articles.append({**article, "paragraphs": []})
            last = article
        articles[-1]["paragraphs"].append(paragraph)
    return articles


if __name__ == "__main__":
    main()
