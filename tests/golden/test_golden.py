"""Checkpoints of every format version up to this one are read correctly."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers

import octav_hf  # noqa: F401  # registers the quantization method
from octav_hf.config import FORMAT_VERSION

from .make import CASES, HERE, expected_of

FOLDERS = sorted(path.parent for path in HERE.glob("v*/*/expected.json"))


def test_every_case_of_this_version_is_kept() -> None:
    assert [folder.name for folder in FOLDERS if folder.parent.name == f"v{FORMAT_VERSION}"] == sorted(CASES)


@pytest.mark.versions
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: f"{folder.parent.name}-{folder.name}")
def test_it_is_read_as_it_was_meant(folder: Path) -> None:
    written = (folder / "expected.json").read_text(encoding="utf-8")
    expected = json.loads(written.replace('"lowest"', '"offset"'))  # what version 1 called it
    for operands in expected["activation_clips"].values():  # version 1 has the numbers in float64
        for frozen in operands.values():
            frozen.update({k: torch.tensor(frozen[k]).tolist() for k in ("clips", "offset") if k in frozen})
    (architecture,) = json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"]
    model = getattr(transformers, architecture).from_pretrained(folder)
    batch = {name: torch.tensor(values) for name, values in expected["batch"].items()}
    actual = expected_of(model, batch)
    assert actual["weights"] == expected["weights"]
    assert actual["activation_clips"] == expected["activation_clips"]
    for output, wanted in zip(actual["outputs"], expected["outputs"], strict=True):
        # Where a sum falls to the other side of a rounding, outputs move by a step of a grid.
        torch.testing.assert_close(torch.tensor(output), torch.tensor(wanted), rtol=0, atol=0.05)
