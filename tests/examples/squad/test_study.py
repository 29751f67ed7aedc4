"""The study: the runs of a grid, continuing after a kill or a failure, and tables and plots of the results file."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import study
from matplotlib.figure import Figure
from squad_study.cells import parse_cells
from squad_study.plots import plot_bytes, plot_f1
from squad_study.record import append_line, read_lines
from squad_study.tables import cells_table, losses_table, scores_table

MODEL = ["--model_name_or_path", "m"]
ARTEFACTS = {"tables.md", "f1.png", "f1.svg", "convergence.png", "convergence.svg"}
CLIP_PLOTS = ("clip_per_layer", "mse_per_layer", "convergence", "second_minimum")
CLIP_ARTEFACTS = {"clips.md"} | {f"{name}.{form}" for name in CLIP_PLOTS for form in ("png", "svg")}


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Replaces the subprocess: records each command and writes invented results."""
    commands: list[list[str]] = []

    def stream(command: list[str], log: Path, threads: str, echo: bool) -> tuple[int, str]:
        commands.append(command)
        folder = Path(command[command.index("--output_dir") + 1])
        folder.mkdir()
        if Path(command[1]).name == "measure_clips.py":
            (folder / "clips.json").write_text('{"measured": []}')
            return 0, ""
        values = {
            "eval_f1": 90.0,
            "eval_exact_match": 80.0,
            "train_loss": 1.0,
            "train_step_seconds_median": len(commands),
            "train_peak_memory_bytes": 2_000_000_000,
        }
        (folder / "all_results.json").write_text(json.dumps(values))
        history = [{"step": 2, "loss": 3.0}, {"step": 4, "loss": 2.0}, {"train_loss": 2.5, "step": 4}]
        (folder / "trainer_state.json").write_text(json.dumps({"log_history": history}))
        return 0, ""

    monkeypatch.setattr(study, "stream", stream)
    return commands


def options(command: list[str]) -> dict[str, str]:
    return {a: b for a, b in pairwise(command) if a.startswith("--")}


def line(method: str, seed: int = 0, f1: float = 50.0, seconds: float = 1.0) -> dict[str, Any]:
    """A finished cell."""
    (cell,) = parse_cells([method], [seed])
    metrics = {
        "eval_f1": f1,
        "eval_exact_match": f1 - 10,
        "train_loss": 1.0,
        "train_step_seconds_median": seconds,
        "train_peak_memory_bytes": 1_500_000_000,
    }
    curve = [[step, 4.0 - step / 10 + seed] for step in (5, 10, 15)]
    return {"cell": cell.name, **cell.to_dict(), "metrics": metrics, "loss_curve": curve, "arguments": []}


def test_cells_differ_in_quantization_and_seed_alone(runs: list[list[str]], tmp_path: Path) -> None:
    cells = ["fp32", "dynamic-octav:4,8", "static-percentile99.99:4", "dynamic-octav-ste:4"]
    study.main([*MODEL, "--cells", *cells, "--seeds", "3", "4", "--output_dir", str(tmp_path), "--static_batches", "7"])
    names = [Path(options(command)["--output_dir"]).name for command in runs]
    one_seed = ["fp32", "dynamic-octav-4bit", "dynamic-octav-8bit", "static-percentile99.99-4bit"]
    one_seed += ["dynamic-octav-ste-4bit"]
    assert names == [f"{name}-seed{seed}" for seed in (3, 4) for name in one_seed]
    own = study.CELL_ARGUMENTS | {"--output_dir"}
    shared = [{k: v for k, v in options(command).items() if k not in own} for command in runs]
    assert all(values == shared[0] for values in shared)
    assert [options(command)["--seed"] for command in runs] == ["3"] * 5 + ["4"] * 5
    assert not options(runs[0]).keys() & (own - {"--output_dir", "--seed"})
    octav, percentile, ste = (options(runs[index]) for index in (2, 3, 4))
    assert (octav["--weight_bits"], octav["--activation_bits"], octav["--activation_clip"]) == ("8", "8", "octav")
    assert (octav["--weight_gradient_estimator"], octav["--activation_gradient_estimator"]) == ("mad", "pwl")
    assert "--static_clip_batches" not in octav
    assert percentile["--static_clip_batches"] == "7"
    assert percentile["--weight_clip_options"] == percentile["--activation_clip_options"] == '{"percentile": 99.99}'
    assert (ste["--weight_gradient_estimator"], ste["--activation_gradient_estimator"]) == ("ste", "ste")


def test_what_a_cell_may_have_on_top(runs: list[list[str]], tmp_path: Path) -> None:
    cells = ["dynamic-mse-fine-shifted-distilled:4", "dynamic-octav-ste-fine:4", "dynamic-mse:4"]
    lines = study.main([*MODEL, "--cells", *cells, "--output_dir", str(tmp_path)])
    assert [line["fine"] for line in lines] == [False, True, True]
    names = [Path(options(command)["--output_dir"]).name for command in runs]
    assert names == [cell.replace(":4", "-4bit-seed0") for cell in cells]
    accurate, fine, plain = map(options, runs)
    assert json.loads(accurate["--activation_granularity"]) == {
        **dict.fromkeys(("input", "query", "key", "probabilities"), "token"),
        "value": "channel",
    }
    assert (accurate["--asymmetric_activations"], accurate["--weight_clip"]) == ("true", "mse")
    assert accurate["--distill_from"] == accurate["--model_name_or_path"]
    assert fine["--activation_granularity"] == accurate["--activation_granularity"]
    assert not {"--asymmetric_activations", "--distill_from"} & {*fine, *plain}
    assert "--activation_granularity" not in plain
    assert "dynamic MSE, fine clips, shifted, distilled" in (tmp_path / "tables.md").read_text()
    assert (tmp_path / "recipes.svg").exists()


def test_a_line_without_extras_is_still_read() -> None:
    line = {"mode": "dynamic", "clip": "octav", "percentile": None, "gradient": "mph", "bits": 4, "seed": 0, "x": 1}
    assert study.cell_of(line).name == "dynamic-octav-4bit-seed0"
    assert study.cell_of({**line, "shifted": True}).name == "dynamic-octav-shifted-4bit-seed0"


def test_the_default_grid_is_the_papers(runs: list[list[str]], tmp_path: Path) -> None:
    """Table 5 has 7 methods at 5 widths; section 4 has 4 estimators, of which Table 5 uses one; and the float model."""
    lines = study.main([*MODEL, "--output_dir", str(tmp_path)])
    assert len(lines) == 7 * 5 + 3 + 1


def test_a_line_has_all_that_makes_a_result(runs: list[list[str]], tmp_path: Path) -> None:
    study.main([*MODEL, "--cells", "static-mse_sweep-mad:5", "--output_dir", str(tmp_path)])
    (text,) = (tmp_path / "results.jsonl").read_text().splitlines()
    found = json.loads(text)
    config = {name: found[name] for name in ("mode", "clip", "percentile", "gradient", "bits", "seed")}
    expected = {"mode": "static", "clip": "mse_sweep", "percentile": None, "gradient": "mad", "bits": 5, "seed": 0}
    assert config == expected
    assert found["metrics"]["eval_f1"] == 90.0
    assert found["loss_curve"] == [[2, 3.0], [4, 2.0]]
    assert found["versions"]["torch"]
    assert found["hardware"]["cpus"] == os.cpu_count()
    assert found["commit"] is None or len(found["commit"].rstrip("+")) == 40
    assert "--learning_rate" in found["arguments"]


def test_clips_are_measured_on_the_float_model_of_the_first_seed(
    runs: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[Any, Path]] = []
    monkeypatch.setattr(study, "write_artefacts", lambda *arguments: drawn.append(arguments))
    words = [*MODEL, "--cells", "fp32", "--seeds", "2", "5", "--clip_bits", "4", "6", "--output_dir", str(tmp_path)]
    words += ["--train_file", "first.json", "--train_file=t.json", "--max_seq_length", "64"]
    assert len(study.main(words)) == 2
    last = options(runs[-1])
    assert Path(runs[-1][1]).name == "measure_clips.py"
    assert last["--model_name_or_path"] == str(tmp_path / "fp32-seed2")
    assert (last["--train_file"], last["--max_seq_length"]) == ("t.json", "64")
    assert runs[-1][-3:] == ["--bits", "4", "6"]
    assert drawn == [({"measured": []}, tmp_path / "clip_measurements")]
    study.main(words)
    assert len(runs) == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--cells", "dynamic-octav:4"], "add fp32 to --cells"),
        (["--cells", "fp32", "--dataset_name", "squad"], "pass it, or leave --clip_bits out"),
    ],
)
def test_clips_that_cannot_be_measured(tmp_path: Path, words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        study.main([*MODEL, *words, "--clip_bits", "4", "--output_dir", str(tmp_path)])


def test_recipe_and_data_can_be_replaced(runs: list[list[str]], tmp_path: Path) -> None:
    words = ["--cells", "fp32", "--output_dir", str(tmp_path), "--learning_rate=1e-5", "--train_file", "t.json"]
    study.main([*MODEL, *words])
    assert "--learning_rate" not in runs[0]
    assert "--learning_rate=1e-5" in runs[0]
    assert options(runs[0])["--train_file"] == "t.json"
    assert "--validation_file" not in runs[0]


def test_finished_cells_are_not_repeated(runs: list[list[str]], tmp_path: Path) -> None:
    words = [*MODEL, "--output_dir", str(tmp_path)]
    first = study.main([*words, "--cells", "fp32"])
    both = study.main([*words, "--cells", "fp32", "dynamic-octav:4"])
    assert len(runs) == 2
    assert both[0] == first[0]


def test_a_line_that_was_cut_off_is_written_anew(runs: list[list[str]], tmp_path: Path) -> None:
    words = [*MODEL, "--output_dir", str(tmp_path), "--cells", "fp32", "dynamic-octav:4"]
    study.main(words)
    path = tmp_path / "results.jsonl"
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    path.write_bytes(whole[: first + 50])
    study.main(words)
    assert len(runs) == 3
    assert path.read_bytes()[:first] == whole[:first]
    assert len(read_lines(path)) == 2
    assert (tmp_path / "dynamic-octav-4bit-seed0.old0").is_dir()


def test_other_arguments_in_the_same_folder(runs: list[list[str]], tmp_path: Path) -> None:
    words = [*MODEL, "--output_dir", str(tmp_path), "--cells", "fp32"]
    study.main(words)
    with pytest.raises(ValueError, match="other arguments.*another --output_dir"):
        study.main([*words, "dynamic-octav:4", "--learning_rate", "1e-5"])
    assert len(runs) == 1


def test_a_failure_shows_status_and_log_and_keeps_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--cells", "fp32", "--output_dir", str(tmp_path), "--train_file", str(tmp_path / "none.json")]
    with pytest.raises(RuntimeError, match=r"(?s)fp32-seed0 failed with exit status 1.*--validation_file is missing"):
        study.main([*MODEL, *words])
    assert "--validation_file is missing" in (tmp_path / "fp32-seed0.log").read_text()
    asked: list[str] = []

    def run_cell(options: Any, cell: Any, arguments: list[str]) -> dict[str, Any]:
        asked.append(cell.name)
        if cell.bits == 4:
            raise RuntimeError("4 bits failed")
        return line(f"{cell.method}:{cell.bits}") | {"seconds": 1.0}

    monkeypatch.setattr(study, "run_cell", run_cell)
    with pytest.raises(RuntimeError, match="4 bits failed"):
        study.main([*MODEL, "--cells", "dynamic-octav:3-8", "--output_dir", str(tmp_path)])
    assert asked == ["dynamic-octav-3bit-seed0", "dynamic-octav-4bit-seed0"]
    assert [found["bits"] for found in read_lines(tmp_path / "results.jsonl")] == [3]


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("octav:4", "'octav:4' is not a cell. Write fp32, or MODE-CLIP:BITS"),
        ("dynamic-octav", "is not a cell"),
        ("dynamic-octave:4", "is not a cell"),
        ("dynamic-octav:9", "bits are 2 to 8"),
        ("dynamic-octav:6-4", "bits are 2 to 8"),
        ("static-percentile:4", "percentile has a number"),
        ("static-octav99:4", "no other clip has one"),
    ],
)
def test_cells_that_are_none(tmp_path: Path, cell: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        study.main([*MODEL, "--cells", cell, "--output_dir", str(tmp_path)])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--weight_bits", "3"], "--weight_bits cannot be set here"),
        (["--jobs", "0"], "--jobs must be at least 1"),
        (["--render", "r.jsonl", "--learning_rate", "1"], "--render runs nothing"),
        (["--render", "none.jsonl"], "no finished cell"),
    ],
)
def test_options_that_are_refused(tmp_path: Path, words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        study.main([*MODEL, "--output_dir", str(tmp_path), *words])


def test_a_broken_results_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text('{"a": 1}\n{"b"\n{"c": 1}\n')
    with pytest.raises(ValueError, match=r"results.jsonl, line 2 is not JSON"):
        read_lines(path)


def test_table_has_the_papers_layout() -> None:
    lines = [line("fp32", f1=88.0), line("fp32", seed=1, f1=89.0)]
    lines += [line("dynamic-octav:4", seed, f1) for seed, f1 in enumerate((80.0, 82.0, 87.0))]
    lines += [line("dynamic-octav:8", f1=88.5), line("static-percentile99.99:4", f1=7.125)]
    assert scores_table(lines, "eval_f1").splitlines() == [
        "| method | 4 | 8 |",
        "|---|---:|---:|",
        "| FP32 | 88.50 ± 0.71 | 88.50 ± 0.71 |",
        "| dynamic OCTAV | 83.00 ± 3.61 | 88.50 |",  # deviations -3, -1, 4: sqrt(26 / 2)
        "| static 99.99 % | 7.12 |  |",
    ]


@pytest.mark.parametrize(("start", "best"), [(90.0, 90.0), (80.0, 88.5)], ids=["start", "FP32"])
def test_losses_are_from_the_better_of_fp32_and_the_start(start: float, best: float) -> None:
    lines = [line("fp32", f1=88.0), line("fp32", seed=1, f1=89.0)]
    lines += [line("dynamic-octav:4", seed, f1) for seed, f1 in enumerate((80.0, 82.0, 87.0))]
    assert losses_table([*lines, line("dynamic-octav:W4A8", f1=88.25)], start).splitlines()[2:] == [
        f"| FP32 | 32 | 2 | 88.50 ± 0.71 | 88.00 to 89.00 | {best - 88.5:.2f} |",
        f"| dynamic OCTAV | 4 | 3 | 83.00 ± 3.61 | 80.00 to 87.00 | {best - 83:.2f} |",
        f"| dynamic OCTAV | W4A8 | 1 | 88.25 |  | {best - 88.25:.2f} |",
    ]


@pytest.mark.parametrize("plot", [plot_f1, plot_bytes])
def test_error_bars_are_of_several_seeds_alone(plot: Callable[[list[dict[str, Any]]], Figure]) -> None:
    lines = [line("dynamic-octav:4", seed, f1) for seed, f1 in enumerate((80.0, 82.0, 87.0))]
    lines += [line("fp32"), line("dynamic-octav:8", f1=88.5)]
    for each in lines:
        each["metrics"]["checkpoint_bytes"] = {None: 9e7, 4: 5e7, 8: 6e7}[each["bits"]]
    drawn = [container.lines[2][0].get_segments() for container in plot(lines).axes[0].containers]
    bars = [bar for segments in drawn for bar in segments if len(bar)]
    assert [bar[1][1] - bar[0][1] for bar in bars] == [pytest.approx(2 * 13**0.5)]  # deviations -3, -1, 4


def test_steps_are_compared_with_the_float_models_of_the_same_seed() -> None:
    lines = [line("fp32", 0, seconds=2.0), line("fp32", 1, seconds=4.0), line("dynamic-octav-ste:4", 1, seconds=5.0)]
    last = cells_table(lines).splitlines()[-1]
    assert last == "| dynamic OCTAV, STE | 4 | 1 | 50.00 | 40.00 | 1.000 | 5.000 | 1.25 | 1.50 |"


def test_everything_is_drawn_again_from_the_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    lines = [line(method, seed) for seed in (0, 1) for method in ("dynamic-max:4", "fp32", "dynamic-octav-pwl:4")]
    for each in [*lines, line("dynamic-octav:4"), line("static-percentile99.9:8"), line("dynamic-mse_sweep:5")]:
        append_line(path, each)
    study.main(["--render", str(path), "--start_f1", "60"])
    assert (
        "| dynamic max-scaling | 4 | 2 | 50.00 ± 0.00 | 50.00 to 50.00 | 10.00 |"
        in (tmp_path / "tables.md").read_text()
    )
    study.main(["--render", str(path)])
    assert "Loss" not in (tmp_path / "tables.md").read_text()
    drawn = {name: (tmp_path / name).read_bytes() for name in ARTEFACTS}
    assert {file.name for file in tmp_path.iterdir()} == ARTEFACTS | {"results.jsonl"}
    assert drawn["f1.png"].startswith(b"\x89PNG")
    for label in ("FP32", "dynamic max-scaling", "static 99.9 %"):
        assert f"<!-- {label} -->".encode() in drawn["f1.svg"]  # matplotlib notes the text that it draws as outlines
    # in another order of lines too: cells that ran at the same time may end in any
    path.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))
    study.main(["--render", str(path)])
    assert {name: (tmp_path / name).read_bytes() for name in ARTEFACTS} == drawn


@pytest.mark.slow
def test_a_killed_study_goes_on_and_ends_in_the_same_results(tiny_model: str, tmp_path: Path) -> None:
    script = Path(study.__file__)
    cells = ["fp32", "dynamic-octav:4", "static-octav:4", "static-percentile99.9:8"]
    size = {"max_train_samples": 24, "max_eval_samples": 8, "logging_steps": 1, "num_train_epochs": 1}
    words = [word for name, value in size.items() for word in (f"--{name}", str(value))]
    environment = os.environ | {"OCTAV_HF_COMPILE": "0", "OMP_NUM_THREADS": "1"}

    def start(name: str, *more: str) -> subprocess.Popen[str]:
        command = [sys.executable, str(script), "--model_name_or_path", tiny_model, "--cells", *cells, *words, *more]
        command += ["--output_dir", str(tmp_path / name), "--clip_bits", "4"]
        return subprocess.Popen(
            command,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    killed = start("killed")
    assert killed.stdout is not None
    while not (text := killed.stdout.readline()).startswith("== static-octav"):
        assert text, "the study ended early"
    os.killpg(killed.pid, signal.SIGKILL)  # its cell too
    killed.communicate()
    before = (tmp_path / "killed" / "results.jsonl").read_text()
    assert [json.loads(text)["cell"] for text in before.splitlines()] == ["fp32-seed0", "dynamic-octav-4bit-seed0"]

    for name, more in (("killed", []), ("whole", ["--jobs", "2"])):
        process = start(name, *more)
        output, _ = process.communicate()
        assert process.returncode == 0, output[-3000:]
    assert (tmp_path / "killed" / "results.jsonl").read_text().startswith(before)
    results = []
    for name in ("killed", "whole"):
        *lines, clips = read_lines(tmp_path / name / "results.jsonl")
        assert clips["clips"]["model"] == "fp32-seed0"
        assert {file.name for file in (tmp_path / name).iterdir()} > ARTEFACTS
        what = ("eval_f1", "eval_exact_match", "train_loss")
        results.append({each["cell"]: (each["loss_curve"], [each["metrics"][key] for key in what]) for each in lines})
    assert results[0] == results[1]
    assert len(results[0]) == 4
    assert all(len(curve) == 3 for curve, _ in results[0].values())


def test_groups_two_widths_learned_clips_features_and_reconstruction(runs: list[list[str]], tmp_path: Path) -> None:
    cells = ["dynamic-mse-fine-shifted-group32:3", "dynamic-mse-fine-shifted-group32:W2A8"]
    cells += ["static-mse-shifted-learned:W4A8", "dynamic-mse-fine-shifted-distilled-group64-reconstructed-features:4"]
    study.main([*MODEL, "--cells", *cells, "--output_dir", str(tmp_path)])
    names = [Path(options(command)["--output_dir"]).name for command in runs]
    assert names == [
        "dynamic-mse-fine-shifted-group32-3bit-seed0",
        "dynamic-mse-fine-shifted-group32-W2A8-seed0",
        "static-mse-shifted-learned-W4A8-seed0",
        "dynamic-mse-fine-shifted-distilled-group64-reconstructed-features-4bit-seed0",
    ]
    three, two, static, all_of_them = map(options, runs)
    assert (three["--weight_granularity"], three["--group_size"]) == ("group", "32")
    assert json.loads(three["--activation_granularity"]) == {
        **dict.fromkeys(("input", "probabilities", "value"), "group"),
        **dict.fromkeys(("query", "key"), "token"),
    }
    assert (three["--weight_bits"], three["--activation_bits"]) == ("3", "3")
    assert (two["--weight_bits"], two["--activation_bits"]) == ("2", "8")
    assert (static["--learned_clips"], static["--static_clip_batches"]) == ("true", "5")
    assert not {"--group_size", "--activation_granularity"} & {*static}
    assert (all_of_them["--group_size"], all_of_them["--distill_from"]) == ("64", "m")
    assert float(all_of_them["--distill_hidden_states"]) > 0 < float(all_of_them["--distill_attentions"])
    assert int(all_of_them["--reconstruct_batches"]) > 0
    assert not {"--learned_clips", "--reconstruct_batches", "--distill_from"} & {*three}
    tables = (tmp_path / "tables.md").read_text()
    assert "| method | 3 | 4 | W2A8 | W4A8 |" in tables
    assert "dynamic MSE, fine clips, shifted, groups of 32" in tables


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("dynamic-mse-learned:4", "write static in the place of dynamic"),
        ("dynamic-mse-features:4", "write distilled too"),
        ("dynamic-mse-group:4", "is not a cell"),
        ("dynamic-mse:W9A8", "is not a cell"),
    ],
)
def test_parts_of_a_cell_that_do_not_go_together(cell: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_cells([cell], [0])


def test_sizes_of_checkpoints_are_drawn_where_they_are_known(tmp_path: Path) -> None:
    lines = [line("fp32"), line("dynamic-octav:4"), line("dynamic-octav:W4A8", f1=60.0)]
    for each, size in zip(lines, (90_000_000, 53_000_000, 53_000_000), strict=True):
        each["metrics"]["checkpoint_bytes"] = size
        append_line(tmp_path / "results.jsonl", each)
    study.main(["--render", str(tmp_path / "results.jsonl")])
    assert {"bytes.png", "bytes.svg"} <= {file.name for file in tmp_path.iterdir()}
