"""Hypothesis against the reader of packed files: whatever is done to the bytes, the file is refused or as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load
from transformers import BertConfig, BertForQuestionAnswering

from octav_hf import OctavConfig, apply_octav, pack_octav
from octav_hf.conversion.record import recorded_config
from octav_hf.packing.manifest import check_files

Edit = tuple[str, float, bytes]
edits = st.lists(
    st.tuples(
        st.sampled_from(["overwrite", "insert", "delete", "cut", "repeat"]),
        st.floats(0, 1, exclude_max=True),
        st.binary(min_size=1, max_size=16),
    ),
    min_size=1,
    max_size=4,
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, OctavConfig, Path]:
    """A packed file's content, its config, and where to put what becomes of it."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    model = BertForQuestionAnswering(BertConfig(vocab_size=10, max_position_embeddings=8, **sizes))
    folder = tmp_path_factory.mktemp("whole")
    pack_octav(apply_octav(model, OctavConfig())).save_pretrained(folder)
    return (folder / "model.safetensors").read_bytes(), recorded_config(model), folder / "edited.safetensors"


def edited(content: bytes, edit: Edit) -> bytes:
    kind, place, data = edit
    # Half of the places are in the first tenth, where the header is.
    position = int(len(content) * (place / 5 if place < 0.5 else 2 * place - 1))
    before, after = content[:position], content[position:]
    return {
        "overwrite": before + data + after[len(data) :],
        "insert": before + data + after,
        "delete": before + after[len(data) :],
        "cut": before,
        "repeat": before + after + after[: len(data)],
    }[kind]


def refusal(path: Path, config: OctavConfig) -> str:
    """Why the file is refused; empty if it is not. Any other exception is the test's."""
    try:
        check_files([path], config)
    except ValueError as error:
        return str(error)
    return ""


@settings(max_examples=400, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(edits)
def test_edited_bytes(whole: tuple[bytes, OctavConfig, Path], changes: list[Edit]) -> None:
    content, config, path = whole
    damaged = content
    for change in changes:
        damaged = edited(damaged, change)
    path.write_bytes(damaged)
    error = refusal(path, config)
    if error:
        assert str(path) in error
        return
    tensors, before = load(damaged), load(content)
    assert tensors.keys() == before.keys()
    assert all(torch.equal(tensors[name], value) for name, value in before.items())
