"""The measurements as Markdown tables."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from reporting.markdown_table import markdown_table

from clip_measurements.measurements import DEPTH, FAR, NEAR, PAPER_UPDATES, REFERENCE_POINTS, STARTS

KINDS = {
    "weight": "weights",
    "embedding": "embedding rows",
    "input": "layer inputs",
    "query": "query",
    "key": "key",
    "probabilities": "probabilities",
    "value": "value",
}
"""Kind of tensor -> its name in tables and plots, in their order."""

Record = dict[str, Any]


def error_ratio(tensor: Record, rule: str) -> float | None:
    """The tensor's MSE by a rule divided by the lowest one; None if that is 0."""
    return tensor["mse"][rule] / tensor["mse"]["best"] if tensor["mse"]["best"] > 0 else None


def clip_ratio(tensor: Record) -> float:
    """The sweep's clip divided by OCTAV's; 1 for a tensor of zeros."""
    return tensor["clips"]["sweep"] / tensor["clips"]["octav"] if tensor["clips"]["octav"] > 0 else 1.0


def markdown_report(record: Record) -> str:
    """All tables, from the content of `clips.json`."""
    measured = record["measured"]
    sections = [
        ["# Clips of a model's tensors", "", *_setting(record)],
        ["## Measured error over the best one", "", _ERROR, "", markdown_table(_ERROR_HEADER, 2, _errors(measured))],
        ["## Time (the paper's Table 6)", "", _TIME, "", markdown_table(_TIME_HEADER, 2, _times(measured))],
        [
            "## Convergence of Eq. 6",
            "",
            _CONVERGENCE,
            "",
            markdown_table(_CONVERGENCE_HEADER, 3, _convergence(measured)),
        ],
        _agreement(measured),
        ["## Second minima (Appendix G)", "", _MINIMA, "", markdown_table(_MINIMA_HEADER, 2, _minima(measured))],
        [_FAR_TENSORS, "", markdown_table(_FAR_HEADER, 2, _far_tensors(measured))],
    ]
    return "\n".join("\n".join(lines) + "\n" for lines in sections).rstrip() + "\n"


_ERROR = (
    f"MSE of the quantized tensor over that of the best of {REFERENCE_POINTS} clips (for a weight, of each row's "
    "best), median over the tensors and worst. Below 1: the clip lies between two of those points."
)
_ERROR_HEADER = (
    *("bits", "tensors", "number"),
    *(f"{rule}, {figure}" for rule in ("OCTAV", "100-point sweep", "max") for figure in ("median", "worst")),
    "worst for OCTAV",
)
_TIME = (
    "Mean over the tensors, milliseconds of processor time. OCTAV is `octav_clip`, which does not run Eq. 6 on the "
    f"whole tensor; the next column does, with the paper's {PAPER_UPDATES} updates, in PyTorch operations like those "
    "of the sweep."
)
_TIME_HEADER = (
    *("bits", "tensors", "OCTAV", f"Eq. 6, {PAPER_UPDATES} updates", "100-point sweep"),
    *("sweep / OCTAV", "sweep / Eq. 6"),
)
_PAPER_TIMES = (("weight tensors", 191, 1943), ("activation tensors", 497, 3141))
_CONVERGENCE = (
    f"Updates from each start until the clip stays within {NEAR:g} of the fixed point (relative), over all clips: one "
    "for each row of a weight, one for any other tensor. A clip above every magnitude, such as the start max, is "
    "followed by 0 and then by the mean of the nonzero magnitudes, the paper's own s_1."
)
_CONVERGENCE_HEADER = ("bits", "clips", "start", "number", "median", "95 %", "most", "not in 100")
_MINIMA = (
    f"Second minimum: a local minimum of the measured MSE over {REFERENCE_POINTS} clips up to max|x|, apart from the "
    f"lowest point by a ridge more than {DEPTH:.0%} above it. Where there are few values, as in a row, or many near "
    "one magnitude, as at the lowest value of GELU, the curve has ripples that count as such. Far: one clip more than "
    f"{FAR:g} times the other, here that of the second minimum and that of the lowest point, or OCTAV's and the "
    "sweep's. "
    "Counted are clips: one for each row of a weight."
)
_MINIMA_HEADER = (
    *("bits", "tensors", "clips", "with a second minimum", "with a far one"),
    *("sweep far above OCTAV", "sweep far below OCTAV"),
)
_FAR_TENSORS = (
    "Tensors whose clips (for a weight: mean clips) are far apart, or with one clip and a second minimum; the largest "
    "sweep / OCTAV first:"
)
_FAR_HEADER = (
    *("bits", "tensor", "max\\|x\\|", "clip, OCTAV", "clip, sweep", "sweep / OCTAV"),
    *("MSE, OCTAV", "MSE, sweep", "second minimum at", "its MSE"),
)


def _setting(record: Record) -> list[str]:
    sizes, windows = record["batch"], record["windows"]
    kinds = Counter(tensor["kind"] for tensor in record["measured"][0]["tensors"])
    counts = ", ".join(f"{kinds[kind]} {name}" for kind, name in KINDS.items() if kind in kinds)
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    hardware = record["hardware"]
    return [
        f"- model `{record['model']}`, quantized {record['quantized']}; one forward pass in training mode",
        f"- batch of {sizes[0]} x {sizes[1]} tokens from `{record['train_file']}`, seed {record['seed']} (windows of "
        f"at most {windows['max_seq_length']} tokens, stride {windows['doc_stride']})",
        f"- tensors: {counts}; layers that read the same input count it once",
        f"- times: processor time, medians of {record['repetitions']} interleaved rounds, {hardware['threads']} "
        f"thread(s) of {hardware['cpus']} {hardware['machine']} CPUs",
        f"- {versions}; commit {record['commit'] or 'unknown'}",
    ]


def _errors(measured: Iterable[Record]) -> Iterable[Sequence[str]]:
    for bits, name, tensors in _by_kind(measured):
        cells = [str(bits), name, str(len(tensors))]
        for rule in ("octav", "sweep", "max"):
            ratios = [ratio for tensor in tensors if (ratio := error_ratio(tensor, rule)) is not None]
            cells += [f"{statistics.median(ratios):.3f}", f"{max(ratios):.3f}"] if ratios else ["", ""]
        worst = max(tensors, key=lambda tensor: error_ratio(tensor, "octav") or 0)
        yield [*cells, f"`{worst['name']}`"]


def _times(measured: Iterable[Record]) -> Iterable[Sequence[str]]:
    for bits, name, tensors in _weights_and_activations(measured):
        octav, eq6, sweep = (1e3 * statistics.mean(t["seconds"][f] for t in tensors) for f in ("octav", "eq6", "sweep"))
        cells = f"{octav:.3f}", f"{eq6:.2f}", f"{sweep:.1f}", f"{sweep / octav:.0f}", f"{sweep / eq6:.1f}"
        yield [str(bits), f"{len(tensors)} {name} tensors", *cells]
    for name, octav_time, sweep_time in _PAPER_TIMES:
        cells = "", str(octav_time), str(sweep_time), "", f"{sweep_time / octav_time:.1f}"
        yield ["", f"paper, BERT-Base, NumPy: {name}", *cells]


def _convergence(measured: Iterable[Record]) -> Iterable[Sequence[str]]:
    for bits, name, tensors in _weights_and_activations(measured):
        for start in STARTS:
            counts: Counter[int] = Counter()
            for tensor in tensors:
                counts.update({int(n): rows for n, rows in tensor["convergence"]["updates"][start].items()})
            never = sum(tensor["convergence"]["never"][start] for tensor in tensors)
            updates = sorted(counts.elements())
            figures = (
                [f"{statistics.median(updates):g}", str(updates[int(0.95 * (len(updates) - 1))]), str(updates[-1])]
                if updates
                else ["", "", ""]
            )
            yield [str(bits), name, start, str(len(updates) + never), *figures, str(never)]


def _agreement(measured: Iterable[Record]) -> list[str]:
    lines = []
    for entry in measured:
        clips = [tensor["convergence"] for tensor in entry["tensors"]]
        total = sum(_clips(tensor) for tensor in entry["tensors"])
        worst = max(tensor["octav_to_fixed_point"] for tensor in entry["tensors"])
        alternating, differing = (sum(c[key] for c in clips) for key in ("alternating", "disagree"))
        jump = max(c["alternation"] for c in clips)
        jumps = f" (there the recursion from 0 ends in jumps of up to {jump:.2%})" if alternating else ""
        lines.append(
            f"- {entry['bits']} bits: {total} clips, of which {alternating} have no fixed point{jumps}. Of the others, "
            f"{differing} end more than {NEAR:g} apart from different starts; `octav_clip` is at most {worst:.1e} from "
            "their fixed points."
        )
    return lines


def _minima(measured: Iterable[Record]) -> Iterable[Sequence[str]]:
    for bits, name, tensors in _by_kind(measured):
        keys = ("second_minima", "second_minima_far", "sweep_far_above", "sweep_far_below")
        counts = [sum(tensor[key] for tensor in tensors) for key in keys]
        yield [str(bits), name, str(sum(map(_clips, tensors))), *map(str, counts)]


def _far_tensors(measured: Iterable[Record]) -> Iterable[Sequence[str]]:
    for entry in measured:
        far = [t for t in entry["tensors"] if t["second_minimum"] or not 1 / FAR <= clip_ratio(t) <= FAR]
        for tensor in sorted(far, key=clip_ratio, reverse=True):
            clips, mse, second = tensor["clips"], tensor["mse"], tensor["second_minimum"]
            yield [
                str(entry["bits"]),
                f"`{tensor['name']}`",
                *(f"{value:.4g}" for value in (clips["max"], clips["octav"], clips["sweep"])),
                f"{clip_ratio(tensor):.2f}",
                *(f"{value:.3g}" for value in (mse["octav"], mse["sweep"])),
                *((f"{second['clip']:.4g}", f"{second['mse']:.3g}") if second else ("", "")),
            ]


def _by_kind(measured: Iterable[Record]) -> Iterable[tuple[int, str, list[Record]]]:
    for entry in measured:
        for kind, name in KINDS.items():
            tensors = [tensor for tensor in entry["tensors"] if tensor["kind"] == kind]
            if tensors:
                yield entry["bits"], name, tensors


def _weights_and_activations(measured: Iterable[Record]) -> Iterable[tuple[int, str, list[Record]]]:
    groups: dict[str, Callable[[str], bool]] = {
        "weight": lambda kind: kind in ("weight", "embedding"),
        "activation": lambda kind: kind not in ("weight", "embedding"),
    }
    for entry in measured:
        for name, belongs in groups.items():
            tensors = [tensor for tensor in entry["tensors"] if belongs(tensor["kind"])]
            if tensors:
                yield entry["bits"], name, tensors


def _clips(tensor: Record) -> int:
    return tensor["rows"] or 1
