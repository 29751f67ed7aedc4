"""Every number in the prose of ``docs/benchmarks.md`` follows from a record."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterator

import pytest
from transformers import BertConfig, BertForQuestionAnswering

from octav_hf import OctavConfig, apply_octav, coverage_report
from tests.host_reads import MINILM

from . import gpu_table
from .benchmark_tables import PAGE, record
from .table_in_page import ROOT

NO_PROSE = re.compile(r"^\|.*?$", re.MULTILINE)
# Code, the targets of links, names, what the commands choose, and what tests/test_host_reads.py compares.
NO_FIGURE = re.compile(
    r"dispatches .* in float\.|`[^`]*`|\]\([^)]*\)|4 bits|4-bit|F1|FP32|10\^\d|AVX-512|2 CPU cores|2 threads"
    r"|AVX2|8-bit|8 × 128 tokens|32 × 384 tokens|bfloat16|float32|float64|H100|seed 0|hidden size 384|x86"
)


def sentences() -> Iterator[str]:
    """The parts of sentences with figures, made from the records."""
    cells = record("examples/squad/results/demo/results.jsonl")
    metrics = cells[0]["metrics"]
    yield f"for {metrics['epoch']} epochs on the {metrics['train_samples']:,} generated training questions"
    yield f"scores it on the {metrics['eval_samples']} dev questions"
    yield f"The three cells took {sum(cell['seconds'] for cell in cells) / 60:.1f} minutes"
    rerun = record("examples/squad/results/demo/rerun.jsonl")
    assert [cell["cell"] for cell in rerun] == [cell["cell"] for cell in cells]
    yield "in another run F1 was {:.2f}, {:.2f} and {:.2f}".format(*(cell["metrics"]["eval_f1"] for cell in rerun))

    model = apply_octav(BertForQuestionAnswering(BertConfig(vocab_size=10, **MINILM)), OctavConfig())
    report = coverage_report(model)
    yield f"MiniLM ({MINILM['num_hidden_layers']} layers,"
    linear, attention = len(report.quantized("linear")) // 2, len(report.quantized("attention"))
    yield f"All {linear} linear layers and {attention} attention operands"

    (questions,) = {row["questions"] for row in record("examples/squad/results/deploy/answers.json")["rows"]}
    inference = record("benchmarks/results/inference.json")
    yield f"on {questions:,} dev questions"
    yield f"{inference['processor'].split(',')[0]}, medians of {inference['rounds']} rounds,"

    step, eager = record("benchmarks/results/step.json"), record("benchmarks/results/step_eager.json")
    (rounds,), (rounds_alone,) = ({len(times) for times in each["times"].values()} for each in (step, eager))
    yield "batch {} × {}, medians of {} rounds. ".format(*step["size"], rounds)
    yield f"the three eager steps alone ({rounds_alone} rounds,"
    assert len(eager["times"]) == 3
    assert eager["size"] == step["size"]
    seconds = {name: statistics.median(times) for name, times in eager["times"].items()}
    times, memory = (
        [each[name] / each["FP32 eager"] for name in ("OCTAV 4-bit", "accurate 4-bit")]
        for each in (seconds, eager["peak_memory_bytes"])
    )
    yield "OCTAV took {:.2f} and `accurate()` {:.2f} times as long as FP32 eager".format(*times)
    yield "with {:.2f} and {:.2f} times its memory".format(*memory)

    matmuls = {row["quantized_matmuls"] for row in record("benchmarks/results/peers.json")} - {""}
    ours, theirs = sorted((int(text.split(" of ")[0]) for text in matmuls), reverse=True)
    yield f"each of the {ours - theirs} attention matmuls"
    yield from on_a_gpu()


def on_a_gpu() -> Iterator[str]:
    """Those of the section on GPUs. What is "within" or "at most" a figure is rounded up."""
    found = record("benchmarks/results/gpu.json")
    rows = {part: {row["name"]: row for row in each["rows"]} for part, each in found["parts"].items()}
    device = {row["name"]: row["device ms"] for row in found["profiler"]["rows"]}
    eager, replayed = (gpu_table.ratio(form, "paper") for form in ("MiniLM, eager", '`"reduce-overhead"`'))
    yield f"it takes {eager:.1f} times as long as in float"
    yield f"only {device['paper, eager']:.0f} ms of it ({device['float eager, eager']:.0f} ms in float)"
    yield f"replays the step as CUDA graphs: {replayed:.1f} times."
    yield f"It ran with torch {found['machine']['torch'].rpartition('.')[0]}, which"

    def worst(rule: str, digits: int) -> str:
        largest = max(row["worst"] for name, row in rows["clip_accuracy"].items() if name.startswith(rule))
        return f"{math.ceil(largest * 10**digits) / 10**digits:.{digits}f}"

    yield f"within {1e6 * float(worst('octav', 7)):.1f}e-6 of float64 and equal to the CPU's"
    assert {row["from the CPU's clip"] for name, row in rows["clip_accuracy"].items() if "octav" in name} == {0}
    tensors, of_rows = (f"1{worst(rule, digits)[1:]}" for rule, digits in (("mse, tensor", 4), ("mse, rows", 3)))
    yield f"at most {tensors} times the lowest (rows {of_rows})"
    graphs = (rows["cuda_graphs"][name]["ms replayed"] for name in ("paper", "accurate", "float sdpa"))
    yield "{:.1f} ms for the paper's recipe, {:.1f} ms for `accurate()`, {:.1f} ms for float with".format(*graphs)
    clips = [rows["clip_speed"][f"probabilities 8x12x384x384, {dtype}"] for dtype in ("float32", "bfloat16")]
    (elements,) = {row["elements"] for row in clips}
    yield f"A clip of {elements / 1e6:.1f} million values"
    (full, full_share), (half, half_share) = ((row["octav graph ms"], 100 * row["octav share"]) for row in clips)
    yield f"{full:.2f} ms in float32 ({full_share:.0f} % of the bandwidth of a copy)"
    yield f"and {half:.2f} ms in bfloat16 ({half_share:.0f} %)"
    yield "called eagerly, {:.2f} to {:.2f} ms".format(*(row["octav ms"] for row in clips))


def prose(page: str) -> str:
    """Without tables, on one line."""
    return re.sub(r"\s+", " ", NO_PROSE.sub("", page))


def without_figures(text: str) -> str:
    """The rest of the prose."""
    for sentence in sentences():
        assert text.count(sentence) == 1, f"{PAGE} does not say once: {sentence}"
        text = text.replace(sentence, "")
    return NO_FIGURE.sub("", text)


def test_every_figure_is_that_of_a_record() -> None:
    rest = without_figures(prose(PAGE.read_text(encoding="utf-8")))
    assert re.findall(r".{,40}\d.{,40}", rest) == []


def test_the_cost_of_the_callback_is_that_of_its_record() -> None:
    cost = record("benchmarks/results/callback.json")
    runs = zip(cost["run_seconds"]["with"], cost["run_seconds"]["without"], strict=True)
    longer = statistics.median(with_callback / without for with_callback, without in runs) - 1
    page = prose((ROOT / "docs/guides/debug_a_layer.md").read_text(encoding="utf-8"))
    assert (
        f"Such a step takes {100 * cost['cost_of_a_logged_step']:.0f} % longer "
        f"(MiniLM, {cost['batch_size']} × {cost['length']} tokens, 2 CPU cores), which is "
        f"{100 * cost['share_of_a_run']:.2f} % of a run with `logging_steps={cost['logging_steps']}`; "
        f"whole runs of {cost['steps']} steps took {100 * longer:.1f} % longer"
    ) in page


def test_a_figure_without_a_record_is_found() -> None:
    """The test above can fail."""
    page = PAGE.read_text(encoding="utf-8")
    assert "7.25" in without_figures(prose(page + "It is 7.25 times as fast."))
    with pytest.raises(AssertionError, match="does not say once: batch 8 × 384, medians of 5 rounds"):
        without_figures(prose(page.replace("medians of 5 rounds. Q", "medians of 6 rounds. Q")))
