"""Runs many histories: ``python -m tests.histories --count 5000 --seed 1 --results results.jsonl``.

It goes on where a results file ends, and prints a table of the failures by kind, each with its shortest history.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from pathlib import Path

import torch

from .history import History


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=None, help="a file of one line per history, to go on with")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    lines = arguments.results.read_text().splitlines() if arguments.results and arguments.results.exists() else []
    results = [json.loads(line) for line in lines]
    begun, first = time.process_time(), len(results)
    for number in range(first, arguments.count):
        results.append(result(number, arguments.seed))
        if arguments.results:
            with arguments.results.open("a") as file:
                print(json.dumps(results[-1]), file=file)
    seconds, failed = time.process_time() - begun, [each for each in results if each["kind"]]
    ran = max(len(results) - first, 1)
    counts = {name: sum(each[name] for each in results) for name in ("done", "refused")}
    print(f"{len(results)} histories, {len(failed)} failed; steps: {counts}; {seconds / ran:.3f} CPU seconds each")
    kinds: dict[str, list[dict]] = {}
    for each in failed:
        kinds.setdefault(each["kind"], []).append(each)
    for kind, found in sorted(kinds.items(), key=lambda item: -len(item[1])):
        shortest = min(found, key=lambda each: len(each["history"]))
        print(f"\n{len(found)} x {kind}\n  {shortest['history']}\n  {shortest['details'][:300]}")


def result(number: int, seed: int) -> dict:
    """What the history of that number gives."""
    history = History.drawn(number, seed)
    try:
        counts = history.run()
    except Exception:
        failure = history.shortened()
        if failure is None:
            raise
        found = {"kind": failure.kind, "history": repr(failure.history), "details": failure.details}
        return {"number": number, "done": 0, "refused": 0, **found}
    return {"number": number, **vars(counts), "kind": "", "history": "", "details": ""}


if __name__ == "__main__":
    main()
