"""The tables of a study, in Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

from reporting.markdown_table import markdown_table

from squad_study.cells import FLOAT_WIDTH, cell_of
from squad_study.record import Line

_CELL_HEADER = (
    "method",
    "bits",
    "seed",
    "F1",
    "EM",
    "train loss",
    "median step (s)",
    "step / FP32",
    "peak memory (GB)",
)


def markdown_tables(lines: Sequence[Line], start_f1: float | None = None) -> str:
    """All tables: F1 and EM in the layout of the paper's Table 5, losses if `start_f1` is given, one line per cell."""
    parts = [
        f"## F1\n\n{scores_table(lines, 'eval_f1')}",
        f"## Exact match\n\n{scores_table(lines, exact_match(lines))}",
        *([] if start_f1 is None else [f"## Loss of F1\n\n{losses_table(lines, start_f1)}"]),
        f"## Cells\n\n{cells_table(lines)}",
    ]
    return "\n\n".join(parts) + "\n"


def exact_match(lines: Sequence[Line]) -> str:
    """The name of the exact-match metric, which differs between SQuAD v1.1 and v2.0."""
    return "eval_exact_match" if "eval_exact_match" in lines[0]["metrics"] else "eval_exact"


def scores_table(lines: Iterable[Line], metric: str) -> str:
    """A row per method and a column per width; percent, with the sample standard deviation over several seeds."""
    scores: dict[str, dict[str, list[float]]] = {}
    for line in lines:
        cell = cell_of(line)
        scores.setdefault(cell.label, {}).setdefault(cell.width, []).append(line["metrics"][metric])
    widths = sorted({width for row in scores.values() for width in row if width != FLOAT_WIDTH})
    rows = []
    for label, row in scores.items():
        if FLOAT_WIDTH in row:  # the float model has one result for all widths
            rows.append((label, *([mean_and_spread(row[FLOAT_WIDTH])] * max(1, len(widths)))))
        else:
            rows.append((label, *(mean_and_spread(row.get(width, [])) for width in widths)))
    return markdown_table(("method", *(widths or [FLOAT_WIDTH])), 1, rows)


def mean_and_spread(values: Sequence[float]) -> str:
    """The mean, and with several values the sample standard deviation; empty for no values."""
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.2f}{spread}"


def losses_table(lines: Iterable[Line], start_f1: float) -> str:
    """F1 over seeds (mean, sample standard deviation, range), and the points that the mean loses.

    The loss is counted from the better of FP32's mean and `start_f1`, the F1 of the model that training starts from,
    because a recipe that makes FP32 worse would hide it.
    """
    scores: dict[tuple[str, str], list[float]] = {}
    for line in lines:
        cell = cell_of(line)
        scores.setdefault((cell.label, cell.width), []).append(line["metrics"]["eval_f1"])
    best = max([start_f1, *(statistics.fmean(values) for (_, width), values in scores.items() if width == FLOAT_WIDTH)])
    rows = [
        (
            label,
            width,
            str(len(values)),
            mean_and_spread(values),
            f"{min(values):.2f} to {max(values):.2f}" if len(values) > 1 else "",
            f"{best - statistics.fmean(values):.2f}",
        )
        for (label, width), values in scores.items()
    ]
    return markdown_table(("method", "bits", "seeds", "F1", "lowest to highest", "loss"), 1, rows)


def cells_table(lines: Sequence[Line]) -> str:
    """One row per cell. Step times are relative to the float model with the same seed."""
    exact = exact_match(lines)
    fp32 = {line["seed"]: line["metrics"].get("train_step_seconds_median") for line in lines if line["bits"] is None}
    rows = []
    for line in lines:
        metrics, seconds = line["metrics"], line["metrics"].get("train_step_seconds_median")
        reference = fp32.get(line["seed"])
        rows.append(
            (
                cell_of(line).label,
                cell_of(line).width,
                str(line["seed"]),
                f"{metrics['eval_f1']:.2f}",
                f"{metrics[exact]:.2f}",
                f"{metrics['train_loss']:.3f}",
                "" if seconds is None else f"{seconds:.3f}",
                "" if seconds is None or reference is None else f"{seconds / reference:.2f}",
                f"{metrics['train_peak_memory_bytes'] / 1e9:.2f}",
            )
        )
    return markdown_table(_CELL_HEADER, 1, rows)
