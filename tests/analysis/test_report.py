"""``report``: what it measures is what the functions measure, and what it refuses it refuses before it writes."""

import copy
import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import BertForQuestionAnswering, ResNetForImageClassification

import octav_hf
from octav_hf import (
    OctavConfig,
    Report,
    apply_octav,
    convert_octav,
    coverage_report,
    pack_octav,
    report,
)
from octav_hf.analysis.divergence import FloatOutputs
from octav_hf.analysis.operand_statistics import operand_statistics
from octav_hf.analysis.page.render import render
from octav_hf.analysis.sensitivity import kind_sensitivity, sensitivity
from tests.analysis.example_report import example_report

MakeBert = Callable[..., BertForQuestionAnswering]


@pytest.fixture
def bert(small_bert: MakeBert) -> BertForQuestionAnswering:
    return apply_octav(small_bert(num_hidden_layers=1), OctavConfig())


def test_page_and_json_hold_what_is_measured(bert: nn.Module, padded_batch: dict, tmp_path: Path) -> None:
    page = tmp_path / "new" / "report.html"
    found = report(bert, iter([padded_batch]), path=page)
    assert Report.load(page.with_suffix(".json")) == found
    assert sorted(path.name for path in page.parent.iterdir()) == ["report.html", "report.json"]
    assert page.read_text(encoding="utf-8") == render(found)

    assert found.model == "BertForQuestionAnswering"
    assert found.batches == 1
    assert OctavConfig.from_dict(found.config).weight_bits == 4
    assert found.operands == coverage_report(bert)
    assert found.statistics == operand_statistics(bert, [padded_batch], histograms=True)
    outputs = FloatOutputs(bert, [padded_batch])
    assert found.kinds == kind_sensitivity(bert, outputs)
    assert found.sensitivity == sensitivity(bert, outputs)
    assert found.functions == {"bert.encoder.layer.0.output.dense": "GELU"}
    assert found.unmeasured == []
    assert found.divergence > 0
    assert found.verdict in page.read_text(encoding="utf-8").replace("<wbr>", "")
    assert str(found).startswith(found.verdict)


def test_divergence_is_that_of_the_logits(
    bert: nn.Module, small_bert: MakeBert, padded_batch: dict, tmp_path: Path
) -> None:
    teacher = small_bert(num_hidden_layers=1, seed=1)
    found = report(bert, [padded_batch], teacher, path=tmp_path / "report.html")
    with torch.no_grad():
        ours, theirs = bert(**padded_batch), teacher(**padded_batch)
    padding, expected = padded_batch["attention_mask"] == 0, []
    for name in ("start_logits", "end_logits"):
        logits = (output[name].double().masked_fill(padding, -math.inf) for output in (theirs, ours))
        p, q = (values.log_softmax(-1) for values in logits)
        expected.append((p.exp() * (p - q)).nan_to_num(nan=0).sum(dim=-1).mean())
    assert found.divergence == pytest.approx(float(torch.stack(expected).mean()), rel=1e-4)
    assert found.divergence_measure == "KL divergence of the logits (nats)"
    assert found.compared_with == "the float model given"


def test_model_is_left_as_it_was(bert: nn.Module, padded_batch: dict, tmp_path: Path) -> None:
    bert.train()
    before = {name: value.clone() for name, value in bert.state_dict().items()}
    state = torch.get_rng_state()
    report(bert, [padded_batch], path=tmp_path / "report.html")
    assert all(module.training for module in bert.modules())
    assert all(torch.equal(value, before[name]) for name, value in bert.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in bert.modules())


def test_image_model(small_resnet: Callable[..., ResNetForImageClassification], tmp_path: Path) -> None:
    model = apply_octav(small_resnet(), OctavConfig(first_last_bits=8))
    batch = {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))}
    found = report(model, [batch], path=tmp_path / "report.html")
    assert {row.kind for row in found.operands} == {"convolution", "linear"}
    assert {row.bits for row in found.statistics} == {4, 8}
    assert "ReLU" in found.functions.values()


def test_path_that_cannot_be_written_is_refused_before_measuring(bert: nn.Module, tmp_path: Path) -> None:
    def batches() -> Iterator[dict]:
        raise AssertionError("a batch was read")
        yield {}

    (tmp_path / "file").touch()
    page = tmp_path / "file" / "new" / "report.html"
    with pytest.raises(NotADirectoryError, match=re.escape(str(page))):
        report(bert, batches(), path=page)


def test_packed_model_says_what_cannot_be_measured(bert: nn.Module, padded_batch: dict, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    found = report(pack_octav(bert), [padded_batch], path=page)
    weights = [f"{row.module} weight" for row in found.operands if row.operand == "weight" and row.bits]
    (operands,) = (each for each in found.unmeasured if each.what == "operands")
    assert operands.names == weights
    assert {each.what for each in found.unmeasured} == {"operands", "outputs", "kinds", "sensitivity", "suggestions"}
    assert {row.operand for row in found.statistics if row.sqnr_db} >= {"input", "probabilities"}
    text = page.read_text(encoding="utf-8")
    assert text.count("<strong>Not measured</strong>: the model is packed") == 4
    assert Report.load(page.with_suffix(".json")) == found


@pytest.mark.slow
def test_compiled_model_is_measured_as_the_model_inside(bert: nn.Module, padded_batch: dict, tmp_path: Path) -> None:
    expected = coverage_report(bert)
    found = report(torch.compile(bert), [padded_batch], path=tmp_path / "report.html")
    assert found.model == "BertForQuestionAnswering"
    assert found.operands == expected
    assert {(row.module, row.operand) for row in found.statistics} == {
        (row.module, row.operand) for row in expected if row.bits is not None
    }
    assert "_orig_mod" not in (tmp_path / "report.json").read_text()


def test_layers_that_no_batch_reaches_are_named(bert: nn.Module, padded_batch: dict, tmp_path: Path) -> None:
    model = nn.ModuleDict({"reached": bert, "other": apply_octav(nn.Sequential(nn.Linear(2, 2)), OctavConfig())})
    model.forward = lambda **batch: bert(**batch)
    found = report(model, [padded_batch], path=tmp_path / "report.html")
    (unmeasured,) = found.unmeasured
    assert unmeasured.reason == "no batch reached them"
    assert unmeasured.names == ["other.0 weight", "other.0 input"]


@pytest.mark.parametrize(
    ("path", "message"), [("report.json", "must end in .html"), ("report", "must end in .html"), ("a.html", "folder")]
)
def test_paths_that_are_refused(
    bert: nn.Module, padded_batch: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, message: str
) -> None:
    (tmp_path / "a.html").mkdir()
    monkeypatch.setattr(type(bert), "forward", None)  # nothing is measured first
    with pytest.raises(ValueError, match=message):
        report(bert, [padded_batch], path=tmp_path / path)


def test_what_is_refused_leaves_files_as_they_are(
    bert: BertForQuestionAnswering, small_bert: MakeBert, padded_batch: dict, tmp_path: Path
) -> None:
    page = tmp_path / "report.html"
    page.write_text("before")
    refused = [
        (bert, [], ValueError, "got no batch"),
        (bert, padded_batch, TypeError, r"write \[batch\]"),
        (bert, [7], TypeError, "here number 1"),
        (bert, [{"input_ids": [1, 2], "label": 0}], TypeError, r"number 1.*got lists \(input_ids, label\).*DataLoader"),
        (bert, [{"input_ids": [[1, 2], [3, 4]]}], TypeError, 'return_tensors="pt"'),
        (small_bert(), [padded_batch], ValueError, "has no module quantized"),
        (bert.state_dict(), [padded_batch], TypeError, "takes a model"),
        (convert_octav(apply_octav(small_bert(), OctavConfig())), [padded_batch], ValueError, "unpack_octav"),
    ]
    for model, batches, error, message in refused:
        with pytest.raises(error, match=f"report.*{message}"):
            report(model, batches, path=page)
    teachers = [
        ("runs/float", TypeError, "takes a teacher that is a model.*got str"),
        (apply_octav(small_bert(num_hidden_layers=1), OctavConfig()), ValueError, "is quantized; pass the float model"),
        (nn.Linear(2, 2), ValueError, "the teacher, a Linear, has no module 'bert.encoder"),
    ]
    for model in (bert, pack_octav(copy.deepcopy(bert))):
        for teacher, error, message in teachers:
            with pytest.raises(error, match=f"report.*{message}"):
                report(model, [padded_batch], teacher, path=page)
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert page.read_text() == "before"


def test_interrupted_writing_leaves_the_old_page(
    bert: nn.Module, padded_batch: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "report.html"
    page.write_text("before")
    monkeypatch.setattr("octav_hf.analysis.report.render", lambda found: "\ud800")  # which UTF-8 cannot hold
    with pytest.raises(UnicodeEncodeError):
        report(bert, [padded_batch], path=page)
    assert page.read_text() == "before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.json"]


def test_data_with_infinite_numbers_comes_back(tmp_path: Path) -> None:
    made = example_report(layers=1)
    first, second, *others = made.statistics
    nothing = replace(second, sqnr_db=None, histogram=None, levels=None)
    made = replace(made, statistics=[replace(first, sqnr_db=math.inf), nothing, *others], divergence=None)
    made.save(tmp_path / "report.json")
    json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)  # JSON has no Infinity
    assert Report.load(tmp_path / "report.json") == made


def test_files_of_another_form_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    for text in ("{}", "[]", '{"model": "Bert"}', "no JSON"):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"report\.json is no report"):
            Report.load(path)


def test_it_is_public() -> None:
    assert octav_hf.report is report
