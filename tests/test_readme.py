"""The README's code runs unchanged, and its links exist."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForQuestionAnswering, BertForQuestionAnswering, TrainingArguments

import octav_hf
from octav_hf import coverage_report
from octav_hf.conversion.record import recorded_config
from tests import config_table
from tests.frozen_activations import frozen_activations

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_there_are_six_snippets() -> None:
    assert len(SNIPPETS) == 6


def test_the_trainer_snippet_runs_and_its_checkpoint_comes_back_quantized(
    small_bert: Callable[..., BertForQuestionAnswering],
    padded_batch: dict,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    small_bert().save_pretrained("path/to/bert")
    position = torch.tensor(3)
    row = {name: value[0] for name, value in padded_batch.items()}
    names = {
        "args": TrainingArguments(output_dir="out", max_steps=2, report_to=[], use_cpu=True),
        "train_dataset": [row | {"start_positions": position, "end_positions": position}] * 4,
    }
    exec(SNIPPETS[0], names)
    printed = capsys.readouterr().out

    with torch.no_grad():
        converted = names["model"].eval()(**padded_batch).start_logits
        logits = []
        for folder in ("bert-4bit", "bert-4bit-packed"):
            loaded = AutoModelForQuestionAnswering.from_pretrained(folder)
            assert len(coverage_report(loaded).quantized("attention")) == 8
            assert folder != "bert-4bit" or str(coverage_report(loaded)) in printed
            logits.append(loaded(**padded_batch).start_logits)
    assert torch.equal(*logits)
    torch.testing.assert_close(converted, logits[0], rtol=0, atol=1e-3)


def test_the_checkpoint_snippet_runs(
    small_bert: Callable[..., BertForQuestionAnswering],
    padded_batch: dict,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    names = {
        "octav_hf": octav_hf,
        "AutoModelForQuestionAnswering": AutoModelForQuestionAnswering,
        "model": octav_hf.apply_octav(small_bert(), octav_hf.OctavConfig()),
        "batches": [padded_batch],
    }
    exec(SNIPPETS[1], names)
    model, loaded = names["model"], names["loaded"]
    assert recorded_config(model).packed
    assert not recorded_config(loaded).packed
    assert frozen_activations(loaded) == frozen_activations(model) != {}
    assert torch.equal(loaded.qa_outputs.weight, model.qa_outputs.weight)


def test_the_integer_snippet_runs(small_bert: Callable[..., BertForQuestionAnswering], padded_batch: dict) -> None:
    model = octav_hf.apply_octav(small_bert(), octav_hf.OctavConfig())
    exec(SNIPPETS[3], {"octav_hf": octav_hf, "model": model, "batches": [padded_batch]})
    assert all(row.arithmetic.startswith("integers") for row in coverage_report(model) if row.bits)


def test_the_checking_snippet_runs(
    small_bert: Callable[..., BertForQuestionAnswering], padded_batch: dict, capsys: pytest.CaptureFixture
) -> None:
    model = octav_hf.apply_octav(small_bert(), octav_hf.OctavConfig())
    exec(SNIPPETS[4], {"octav_hf": octav_hf, "model": model, "batch": padded_batch})
    assert capsys.readouterr().out == "0 operands in float; 17 matmuls ran\n"


def test_the_numerics_snippet_runs() -> None:
    names: dict[str, torch.Tensor] = {}
    exec(SNIPPETS[5], names)
    assert names["clip"].shape == (1024, 1)
    assert names["y"].shape == names["x"].shape
    assert all(row.unique().numel() <= 16 for row in names["y"])


def test_the_table_of_the_config_is_that_of_its_fields() -> None:
    _, _, rest = README.partition(config_table.BEGIN)
    assert rest.partition(config_table.END)[0] == config_table.render(), "run python -m tests.config_table"


@pytest.mark.parametrize(
    "document", ["README.md", "examples/squad/README.md", "examples/image_classification/README.md"]
)
def test_links_lead_somewhere(document: str) -> None:
    folder = (ROOT / document).parent
    for link in re.findall(r"\]\(([^)#]+)\)", (ROOT / document).read_text(encoding="utf-8")):
        assert link.startswith("https://") or (folder / link).exists(), link
