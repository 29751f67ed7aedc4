"""The comparison of clipping rules, against independent float64 computations, and the script from end to end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from clip_measurements.tensors import SeenTensor
from compare_rules import error, lowest_error, made_tensors, main
from squad_files import DATA

from octav_hf.functional import octav_clip
from tests import twins


@pytest.mark.parametrize("num_bits", [2, 4, 8])
def test_the_errors_of_a_tensor_and_of_rows(num_bits: int) -> None:
    x = torch.randn(3, 400, generator=torch.Generator().manual_seed(0))
    whole, rows = (SeenTensor("x", "input", x, True, dim) for dim in (None, 1))
    clip = twins.octav_clip_twin(x, num_bits)
    assert error(whole, octav_clip, num_bits) == pytest.approx(twins.mse_twin(x, clip, num_bits), rel=1e-3)
    assert lowest_error(whole, num_bits) == pytest.approx(twins.best_sweep_mse(x, num_bits), rel=1e-6)
    of_rows = [twins.mse_twin(row, twins.octav_clip_twin(row, num_bits), num_bits) for row in x]
    assert error(rows, octav_clip, num_bits) == pytest.approx(sum(of_rows), rel=1e-3)
    best = [twins.best_sweep_mse(row, num_bits) for row in x]
    assert lowest_error(rows, num_bits) == pytest.approx(sum(best), rel=1e-4)


def test_made_tensors_are_what_they_are_called() -> None:
    made = {seen.name: seen for seen in made_tensors(20_000, seed=0)}
    assert len(made) == 15
    assert all(seen.values.numel() > 19_000 and seen.values.isfinite().all() for seen in made.values())
    assert all(seen.signed or seen.values.min() >= 0 for seen in made.values())
    assert made["softmax of 4 Gaussian"].values.sum(dim=-1).allclose(torch.ones(1))
    assert (made["20 outliers at 60"].values == 60).sum() == 20
    assert 0.04 < made["sparse, 5 % Gaussian"].values.count_nonzero() / 20_000 < 0.06
    again = {seen.name: seen.values for seen in made_tensors(20_000, seed=0)}
    assert all(torch.equal(again[name], seen.values) for name, seen in made.items())


def test_the_script_on_a_model(tiny_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--output_dir", str(tmp_path), "--model_name_or_path", tiny_model, "--max_samples", "2"]
    words += ["--max_seq_length", "64", "--doc_stride", "16"]
    record = main([*words, "--train_file", str(DATA / "train.json"), "--bits", "4", "3", "--made_elements", "2000"])
    assert json.loads((tmp_path / "rules.json").read_text()) == record
    assert {row["kind"] for row in record["measured"]} >= {"made", "weight", "input", "query", "probabilities"}
    assert {row["bits"] for row in record["measured"]} == {3, 4}
    report = (tmp_path / "rules.md").read_text()
    assert "| probabilities (model) | mse |" in report
    (tmp_path / "rules.md").unlink()
    capsys.readouterr()
    assert main(["--render", str(tmp_path / "rules.json")]) == record
    assert (tmp_path / "rules.md").read_text() == report
    assert capsys.readouterr().out.strip() == report.strip()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--output_dir missing"),
        (["--render", "x.json", "--seed", "1"], "--seed would be ignored"),
        (["--output_dir", "x", "--train_file", "y"], "go together"),
        (["--output_dir", "x", "--max_samples", "2"], "--max_samples would be ignored without a model"),
        (["--output_dir", "x", "--made_elements", "0"], "--made_elements must be at least 1"),
    ],
    ids=str,
)
def test_refuses_what_would_be_ignored(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(words)
    assert message in capsys.readouterr().err
