"""The image classification study: its data, models and table, and a run of one epoch."""

from __future__ import annotations

import json
from pathlib import Path

import digits_study
import pytest
import torch
from digits_data import Images, digits
from digits_models import MODELS
from digits_table import markdown_table
from torch import nn

from octav_hf import OctavConfig, apply_octav, coverage_report

EXAMPLE = Path(digits_study.__file__).parent
RECORDS = sorted((EXAMPLE / "results").glob("*.json"))


def contents(images: Images) -> set[bytes]:
    return {image.numpy().tobytes() for image in images.pixel_values}


def test_parts_are_fixed_balanced_and_disjoint() -> None:
    data = digits()
    assert [len(part) for part in data] == [1200, 597, 1000, 200]
    for part, again in zip(data, digits(), strict=True):
        assert torch.equal(part.pixel_values, again.pixel_values)
        shares = part.labels.bincount() / len(part)
        assert shares.min() > 0.09
        assert shares.max() < 0.11
    train, test, fit, held_out = (contents(part) for part in data)
    assert len(train | test) == 1797
    assert not fit & held_out
    assert fit | held_out == train


def test_images_are_normalized_with_the_train_images_alone() -> None:
    data = digits()
    pixels = data.train.pixel_values
    assert pixels.shape[1:] == (1, 32, 32)
    assert abs(pixels.mean()) < 1e-5
    assert abs(pixels.std() - 1) < 1e-5
    assert abs(data.test.pixel_values.mean()) > 1e-5
    assert data.train[3]["pixel_values"].dtype == torch.float32


@pytest.mark.parametrize(
    "method", [name for name, difference in digits_study.METHODS.items() if difference is not None]
)
@pytest.mark.parametrize("name", MODELS)
def test_methods_quantize_everything_as_the_paper_says(name: str, method: str) -> None:
    difference = digits_study.METHODS[method]
    assert difference is not None
    model = apply_octav(MODELS[name](), OctavConfig(**digits_study.CONFIG, **difference))
    report = coverage_report(model)
    assert not report.left_in_float()
    first, *between, last = [row for row in report if row.operand == "weight"]
    assert (first.bits, last.bits, {row.bits for row in between}) == (8, 8, {4})
    assert (first.granularity, last.granularity) == ("channel", "tensor")
    assert {row.clip for row in report} == {"max" if method == "max" else "octav"}
    if method != "max":
        gradients = {"mph": ("mad", "pwl")}.get(method, (method, method))
        assert {row.gradient_estimator for row in report if row.operand == "weight"} == {gradients[0]}
        assert {row.gradient_estimator for row in report if row.operand == "input"} == {gradients[1]}


def test_mobilenet_averages_its_batch_statistics() -> None:
    norms = [module for module in MODELS["mobilenet_v2"]().modules() if isinstance(module, nn.BatchNorm2d)]
    assert {norm.momentum for norm in norms} == {0.1}


def test_table_has_mean_and_spread() -> None:
    rows = [
        {"model": "a", "method": "fp32", "accuracy": 98.0},
        {"model": "a", "method": "fp32", "accuracy": 96.0},
        {"model": "a", "method": "mph", "accuracy": 90.0},
        {"model": "b", "method": "fp32", "accuracy": 50.0},
    ]
    assert markdown_table(rows).splitlines() == [
        "| model | FP32 | MPH |",
        "|---|---:|---:|",
        "| a | 97.00 ± 1.41 | 90.00 |",
        "| b | 50.00 |  |",
    ]


def test_one_epoch(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A few passes over few images: both methods learn from the same start, and the record matches the runs."""
    arguments = ["--models", "resnet", "--methods", "fp32", "mph", "--seeds", "3", "--epochs", "2"]
    rows = digits_study.main([*arguments, "--part", "held_out", "--output_dir", str(tmp_path)])
    assert [(row["model"], row["method"], row["seed"]) for row in rows] == [("resnet", "fp32", 3), ("resnet", "mph", 3)]
    for row in rows:
        assert 30 < row["accuracy"] <= 100
        assert row["train_loss"] < 2
    assert rows[0]["train_loss"] != rows[1]["train_loss"]
    record = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert record["rows"] == rows
    assert (record["options"]["part"], record["options"]["bits"]) == ("held_out", 4)
    assert record["recipe"]["num_train_epochs"] == record["options"]["epochs"] == 2
    assert record["versions"]["torch"] == torch.__version__
    assert (tmp_path / "results.md").read_text(encoding="utf-8") == markdown_table(rows) + "\n"
    assert markdown_table(rows) in capsys.readouterr().out


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_the_readme_quotes_the_record(path: Path) -> None:
    record = json.loads(path.read_text(encoding="utf-8"))
    assert record["options"]["part"] == "test"
    assert path.stem.endswith(f"{record['options']['bits']}bit")
    assert record["recipe"] == digits_study.RECIPE
    assert markdown_table(record["rows"]) in (EXAMPLE / "README.md").read_text(encoding="utf-8")


def test_there_are_three_records() -> None:
    assert len(RECORDS) == 3
