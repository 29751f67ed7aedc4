"""Write a small extractive question-answering set in the official SQuAD v1.1 layout.

    python generate_squad.py --seed 0 --output_dir data

Most paragraphs state four facts about one invented subject. A quarter state two facts each about two subjects of one
kind, often the same facts. A model must therefore read the question, which tells which fact is asked for, and for two
subjects also whose. Train and dev share neither a name nor a paragraph, and some wordings of questions occur only in
dev. The same seed gives the same bytes.
"""

from __future__ import annotations

import argparse
import json
import random
from itertools import product
from pathlib import Path
from typing import Any

from squad_task.names import ENDINGS, MIDDLES, MONTHS, NAME_WORDS, ONSETS
from squad_task.templates import DOMAINS, Domain, Fact, Number, Phrase

QUESTIONS_PER_PARAGRAPH = 3
DEV_WORDING_SHARE = 0.5
# Number of facts about each subject of a paragraph.
FACTS_PER_SUBJECT = ((4,), (4,), (4,), (2, 2))


def generate(seed: int, train_paragraphs: int, dev_paragraphs: int) -> dict[str, dict[str, Any]]:
    """Two sets in SQuAD v1.1 layout, `{"train": ..., "dev": ...}`, with three questions per paragraph."""
    rng = random.Random(seed)
    invented = ["".join(parts).capitalize() for parts in product(ONSETS, MIDDLES, ENDINGS)]
    real = [word.capitalize() for word in NAME_WORDS]
    rng.shuffle(invented)
    rng.shuffle(real)
    # the two splits get alternate words, so they share no names
    return {
        "train": _split("train", train_paragraphs, _Names(rng, invented[::2], real[::2])),
        "dev": _split("dev", dev_paragraphs, _Names(rng, invented[1::2], real[1::2])),
    }


class _Names:
    """Draws names without using a word twice in a paragraph."""

    def __init__(self, rng: random.Random, invented: list[str], real: list[str]) -> None:
        self.rng, self.pools = rng, {"invented": invented, "real": real}
        self.start_paragraph()

    def start_paragraph(self) -> None:
        # no paragraph needs more than 20
        self.drawn = {kind: iter(self.rng.sample(words, 20)) for kind, words in self.pools.items()}

    def place(self) -> str:
        return next(self.drawn["invented"])

    def word(self) -> str:
        return next(self.drawn["real"])

    def person(self) -> str:
        return f"{self.place()} {self.word()}"


def _split(split: str, count: int, names: _Names) -> dict[str, Any]:
    articles: dict[str, list[dict[str, Any]]] = {domain.title: [] for domain in DOMAINS}
    for number in range(count):
        domain = DOMAINS[number % len(DOMAINS)]
        articles[domain.title].append(_paragraph(f"{split}-{number:04d}", names, domain))
    data = [{"title": title, "paragraphs": paragraphs} for title, paragraphs in articles.items()]
    return {"version": "1.1", "data": data}


def _paragraph(name: str, names: _Names, domain: Domain) -> dict[str, Any]:
    rng = names.rng
    facts_told = rng.choice(FACTS_PER_SUBJECT)
    while True:
        names.start_paragraph()
        subjects = [
            domain.name.format(p=names.person()) if "{p}" in domain.name else domain.name.format(w=names.word())
            for _ in facts_told
        ]
        told = [
            (subject, fact, _value(fact, names))
            for subject, count in zip(subjects, facts_told, strict=True)
            for fact in rng.sample(domain.facts, count)
        ]
        blocks = [_tell(rng, subject, domain.pronoun, [t for t in told if t[0] == subject]) for subject in subjects]
        context = " ".join(sentence for block in blocks for sentence in block)
        if all(context.count(value) == 1 for _, _, value in told):
            break
    questions = []
    for i, (subject, fact, value) in enumerate(rng.sample(told, QUESTIONS_PER_PARAGRAPH)):
        unseen = name.startswith("dev") and rng.random() < DEV_WORDING_SHARE
        wording = rng.choice(fact.dev_questions if unseen else fact.questions)
        questions.append(
            {
                "id": f"{name}-{i}",
                "question": wording.format(s=subject),
                "answers": [{"text": value, "answer_start": context.index(value)}],
            }
        )
    return {"context": context, "qas": questions}


def _tell(rng: random.Random, subject: str, pronoun: str, told: list[tuple[str, Fact, str]]) -> list[str]:
    """The facts of one subject as sentences in random order, sometimes joined or with a pronoun."""
    rng.shuffle(told)
    sentences: list[str] = []
    while told:
        _, fact, value = told.pop()
        by_name = not sentences or not pronoun or rng.random() < 0.75
        mention = subject if by_name else pronoun
        if mention == subject and rng.random() < 0.3:
            sentence = rng.choice(fact.sentences).format(s=subject, v=value)
        else:
            sentence = f"{mention} {rng.choice(fact.predicates).format(v=value)}"
            if told and rng.random() < 0.4:
                _, fact, value = told.pop()
                sentence += f" and {rng.choice(fact.predicates).format(v=value)}"
        sentences.append(sentence[0].upper() + sentence[1:] + ".")
    return sentences


def _value(fact: Fact, names: _Names) -> str:
    kind, rng = fact.value, names.rng
    if isinstance(kind, Number):
        return f"{rng.randint(kind.low, kind.high)} {kind.unit}"
    if isinstance(kind, Phrase):
        return f"{rng.choice(kind.first.split())} {rng.choice(kind.second.split())}"
    if kind == "person":
        return names.person()
    if kind == "place":
        return names.place()
    year = str(rng.randint(1750, 1999))
    return year if kind == "year" else f"{rng.randint(1, 28)} {rng.choice(MONTHS)} {year}"


def main(argv: list[str] | None = None) -> None:
    """Write `train.json` and `dev.json` into `--output_dir`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).parent / "data")
    parser.add_argument("--train_paragraphs", type=int, default=448, help="three questions each")
    parser.add_argument("--dev_paragraphs", type=int, default=112, help="three questions each")
    args = parser.parse_args(argv)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for split, content in generate(args.seed, args.train_paragraphs, args.dev_paragraphs).items():
        path = args.output_dir / f"{split}.json"
        path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"{path}: {sum(len(p['qas']) for article in content['data'] for p in article['paragraphs'])} questions")


if __name__ == "__main__":
    main()
