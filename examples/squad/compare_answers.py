"""Compare the answers of one model in several forms: simulated, with integer arithmetic, and in onnxruntime.

    python run_squad.py --model_name_or_path runs/w4a8/packed --do_eval --also_evaluate float64 integer \\
        --output_dir runs/check …
    python evaluate_onnx.py --model_folder runs/w4a8/onnx --output_dir runs/check …
    python compare_answers.py --runs runs/check --output_dir results

A run is the output folder of these scripts. Forms are compared question by question. Floating-point rounding decides to
which integer a value halfway between two levels is rounded, and each such difference changes codes in all later layers.
The simulation in float64, which differs from the one in float32 only by rounding, shows how large this effect is. The
script writes `answers.json` and `answers.md`.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from pathlib import Path
from typing import Any

from reporting.markdown_table import markdown_table
from reporting.run_environment import environment

SIMULATED, FLOAT64 = "simulated", "simulated, float64"
# form -> beginning of the paths of its files
FORMS = {
    SIMULATED: "eval",
    FLOAT64: "float64",
    "exact products": "reference",
    "integer": "integer",
    "onnxruntime": "onnx",
    "onnxruntime, its own int8": "dynamic_int8/onnx",
}
NBest = dict[str, list[dict[str, Any]]]


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    """Compare, print and write the table, and return its rows.

    Raises:
        FileNotFoundError: a run has not been evaluated.
        ValueError: two forms answered different questions.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--runs", nargs="+", type=Path, required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1, help="threads of the runs, for the record")
    options = parser.parse_args(argv)
    rows = [row for run in options.runs for row in rows_of(run)]
    options.output_dir.mkdir(parents=True, exist_ok=True)
    record = {"rows": rows, **environment(options.threads)}
    (options.output_dir / "answers.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (options.output_dir / "answers.md").write_text(table(rows) + "\n", encoding="utf-8")
    print(table(rows))
    return rows


def rows_of(run: Path) -> list[dict[str, Any]]:
    """A row per form in which `run` was evaluated: scores, and `differences` from the simulated forms by name."""
    present = {form: prefix for form, prefix in FORMS.items() if (run / f"{prefix}_results.json").is_file()}
    if SIMULATED not in present:
        raise FileNotFoundError(f"{run} has no eval_results.json. Evaluate the run first: run_squad.py --do_eval.")
    lists = {form: _read(run / f"{prefix}_nbest_predictions.json") for form, prefix in present.items()}
    bases = {base: lists[base] for base in (SIMULATED, FLOAT64) if base in present}
    rounding = max(differences(lists[SIMULATED], base)["moved_max"] for base in bases.values())
    rows: list[dict[str, Any]] = []
    for form, prefix in present.items():
        results = _read(run / f"{prefix}_results.json")
        scores = {key: results[f"{Path(prefix).name}_{key}"] for key in ("f1", "exact_match")}
        found = {name: differences(base, lists[form], rounding) for name, base in bases.items() if name != form}
        rows.append({"run": run.name, "form": form, "questions": len(lists[form]), **scores, **found})
    return rows


def differences(base: NBest, other: NBest, rounding: float = 0.0) -> dict[str, Any]:
    """How the n-best lists of two forms differ.

    Args:
        rounding: maximum change of a score by rounding alone.

    Returns:
        `moved_median`, `moved_max`: median and maximum over the questions of the largest change of the score of a span
        in both lists; `changed`: number of questions with another best span; `ties`: number of these questions where
        `base` prefers its own span by at most twice `rounding`, because each of the two scores may change by that much.
    """
    if base.keys() != other.keys():
        raise ValueError("The forms were evaluated on different questions. Give all of them the same data arguments.")
    moved, gaps = [], []
    for identifier, candidates in base.items():
        mine, others = _scores(candidates), _scores(other[identifier])
        moved.append(max((abs(mine[span] - others[span]) for span in mine.keys() & others.keys()), default=0.0))
        best, other_best = next(iter(mine), None), next(iter(others), None)
        if best != other_best:
            gaps.append(mine[best] - mine[other_best] if {best, other_best} <= mine.keys() else math.inf)
    return {
        "changed": len(gaps),
        "ties": sum(gap <= 2 * rounding for gap in gaps),
        "moved_median": statistics.median(moved),
        "moved_max": max(moved),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    header = ["run", "arithmetic", "F1", "EM"]
    for base in ("simulated", "float64"):
        header += [f"spans unlike {base}", "of these ties", "scores moved, median", "most"]
    lines = []
    for row in rows:
        line = [row["run"], row["form"], f"{row['f1']:.2f}", f"{row['exact_match']:.2f}"]
        for base in (SIMULATED, FLOAT64):
            found = row.get(base)
            line += [str(found[name]) if found else "" for name in ("changed", "ties")]
            line += [f"{found[name]:.2g}" if found else "" for name in ("moved_median", "moved_max")]
        lines.append(line)
    return markdown_table(header, 2, lines)


def _scores(candidates: list[dict[str, Any]]) -> dict[tuple[int, int], float]:
    """{(first, last character): score}, best first."""
    return {tuple(candidate["offsets"]): candidate["score"] for candidate in candidates}


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
