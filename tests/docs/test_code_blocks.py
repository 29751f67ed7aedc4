"""Every code block of the README and of the pages runs: those of a page in their order, in one namespace."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForQuestionAnswering, TrainingArguments

from octav_hf import coverage_report

from .code_blocks import Block, blocks_of
from .commands import run_commands
from .table_in_page import ROOT

DOCS = ROOT / "docs"
PAGES = sorted(page for page in DOCS.rglob("*.md") if "_build" not in page.parts)
QUICKSTART = DOCS / "quickstart.md"


def run(page: Path, names: dict[str, Any]) -> None:
    """Run the page's blocks with ``names``; tracebacks have the page's lines."""
    for block in blocks_of(page):
        if block.not_run:
            continue
        if block.language == "sh":
            run_commands(block.code)
        else:
            exec(compile("\n" * block.line + block.code, str(page), "exec"), names)


def python_blocks(page: Path) -> list[Block]:
    return [block for block in blocks_of(page) if block.language == "python"]


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if any(blocks_of(page))], ids=lambda page: page.stem)
def test_a_page_runs(page: Path, workspace: Path) -> None:
    names: dict[str, Any] = {"__name__": "__main__"}
    if page.parent.name == "guides":
        exec(python_blocks(QUICKSTART)[0].code, names)  # whose names the guides use
    run(page, names)


def test_the_readme_runs(workspace: Path, capsys: pytest.CaptureFixture) -> None:
    """Its model comes back quantized, packed too, and the converted one has its outputs."""
    (workspace / "path/to").mkdir(parents=True)
    (workspace / "runs/demo/fp32-seed0").rename("path/to/bert")
    ids = torch.randint(5, 50, (2, 16), generator=torch.Generator().manual_seed(0))
    row = {"input_ids": ids[0], "start_positions": torch.tensor(3), "end_positions": torch.tensor(3)}
    names = {
        "args": TrainingArguments("out", max_steps=2, report_to=[], use_cpu=True),
        "train_dataset": [row] * 4,
    }
    run(ROOT / "README.md", names)
    printed = capsys.readouterr().out
    with torch.no_grad():
        converted = names["model"].eval()(ids).start_logits
        logits = []
        for folder in ("bert-4bit", "bert-4bit-packed"):
            loaded = AutoModelForQuestionAnswering.from_pretrained(folder)
            assert len(coverage_report(loaded).quantized("attention")) == 8
            assert folder != "bert-4bit" or str(coverage_report(loaded)) in printed
            logits.append(loaded(ids).start_logits)
    assert torch.equal(*logits)
    torch.testing.assert_close(converted, logits[0], rtol=0, atol=1e-3)


def test_only_what_needs_a_network_is_not_run() -> None:
    reasons = [block.not_run for page in [ROOT / "README.md", *PAGES] for block in blocks_of(page) if block.not_run]
    assert sorted(set(reasons)) == ["it downloads", "it uploads, which needs an account"]


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("make no-such-target", AssertionError),
        ('pip install -c constraints.txt ".[no-such-extra]"', AssertionError),
        ("octav-hf pack --no-such-option a b", SystemExit),
        ("octav-hf inspect no-such-folder", AssertionError),
        ("octav-hf push --no-such-option a b", SystemExit),
        ("python examples/squad/run_squad.py --model_name_or_path x --output_dir y --no_such_option", ValueError),
        ("python examples/squad/evaluate_onnx.py --no_such_option", AssertionError),
        ("torchrun --no_such_option examples/squad/run_squad.py", SystemExit),
        ("curl", KeyError),
    ],
)
def test_a_wrong_command_is_an_error(code: str, error: type[BaseException], workspace: Path) -> None:
    with pytest.raises(error):
        run_commands(code)
