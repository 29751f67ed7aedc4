"""An ONNX file is evaluated without torch, with the same answers and scores as its model in `run_squad.py`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from run_squad import main as run_squad
from squad_files import DATA, question, write_squad
from transformers import AutoModelForQuestionAnswering, AutoTokenizer

pytest.importorskip("onnxscript", reason="pip install octav-hf[onnx]")
onnx = pytest.importorskip("onnx", reason="pip install octav-hf[onnx]")
evaluate_onnx = pytest.importorskip("evaluate_onnx", reason="needs onnxruntime: pip install octav-hf[onnx]")

pytestmark = pytest.mark.slow

SIZES = ("--max_seq_length", "64", "--doc_stride", "16", "--pad_to_max_length", "false")
EXAMPLE = Path(evaluate_onnx.__file__)
WITHOUT_TORCH = """
import runpy, sys
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
sys.exit(f"imported {found}" if (found := {"torch", "octav_hf"} & {*sys.modules}) else 0)
"""


@pytest.fixture(scope="module")
def exported(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The float model as ONNX; its logits differ from PyTorch's only by rounding, with large gaps between scores."""
    folder = tmp_path_factory.mktemp("exported")
    ids = torch.randint(1000, 2000, (2, 16))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    program = torch.onnx.export(
        AutoModelForQuestionAnswering.from_pretrained(tiny_model).eval(),
        kwargs=inputs,
        dynamo=True,
        dynamic_shapes={name: {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC} for name in inputs},
        output_names=["start_logits", "end_logits"],
        verbose=False,
    )
    program.save(folder / "model.onnx")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return str(folder)


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def test_without_torch_it_answers_as_the_model_does(tiny_model: str, exported: str, tmp_path: Path) -> None:
    data = ["--validation_file", str(DATA / "dev.json"), "--max_eval_samples", "40", *SIZES]
    words = ["--model_folder", exported, "--output_dir", str(tmp_path / "onnx"), "--batch_size", "7", *data]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", WITHOUT_TORCH, str(EXAMPLE), *words]
    subprocess.run(command, check=True, env=environment, cwd=EXAMPLE.parent)
    expected = run_squad(["--model_name_or_path", tiny_model, "--output_dir", str(tmp_path), "--do_eval", *data])
    results = read(tmp_path / "onnx/onnx_results.json")
    assert (results["onnx_f1"], results["onnx_samples"]) == (expected["eval_f1"], 40)
    assert results["onnx_exact_match"] == expected["eval_exact_match"]
    assert read(tmp_path / "onnx/onnx_predictions.json") == read(tmp_path / "eval_predictions.json")
    best = [read(tmp_path / f"{name}_nbest_predictions.json") for name in ("onnx/onnx", "eval")]
    for identifier, candidates in best[1].items():
        scores = [candidate["score"] for candidate in candidates]
        assert [candidate["score"] for candidate in best[0][identifier]] == pytest.approx(scores, abs=1e-4)


def test_v2_questions(tiny_model: str, exported: str, tmp_path: Path) -> None:
    none = {**question("none"), "answers": [], "is_impossible": True}
    path = write_squad(tmp_path / "dev.json", question("some"), none)
    data = ["--validation_file", str(path), "--version_2_with_negative", *SIZES]
    expected = run_squad(["--model_name_or_path", tiny_model, "--output_dir", str(tmp_path), "--do_eval", *data])
    results = evaluate_onnx.main(["--model_folder", exported, "--output_dir", str(tmp_path), *data])
    names = ("exact", "f1", "HasAns_f1", "NoAns_f1", "best_f1", "best_f1_thresh")
    for name in names:
        assert results[f"onnx_{name}"] == pytest.approx(expected[f"eval_{name}"], abs=1e-5)
    assert (tmp_path / "onnx_null_odds.json").is_file()


def test_what_is_refused(exported: str, tmp_path: Path) -> None:
    words = ["--output_dir", str(tmp_path / "out"), "--validation_file", str(DATA / "dev.json"), "--model_folder"]
    with pytest.raises(ValueError, match="--train_file and --max_train_samples would be ignored"):
        evaluate_onnx.main([*words, exported, "--max_train_samples", "3"])
    with pytest.raises(FileNotFoundError, match=r"no .*model.onnx. Give a folder that `octav-hf export"):
        evaluate_onnx.main([*words, str(tmp_path)])
    x = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    y = onnx.helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, [1])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["x"], ["logits"])], "other", [x], [y])
    opset = [onnx.helper.make_opsetid("", 21)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=10), tmp_path / "model.onnx")
    with pytest.raises(ValueError, match="has the outputs logits, not start_logits and end_logits"):
        evaluate_onnx.main([*words, str(tmp_path)])
    assert not (tmp_path / "out").exists()
