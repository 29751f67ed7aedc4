"""Hypothesis tests of reading checkpoints: the loaded model is unchanged, or the error tells what is wrong.

Bytes of packed files, and headers, ``config.json`` and index of each form as somebody might have written them.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load
from transformers import BertConfig, BertForQuestionAnswering

from octav_hf import OctavConfig, apply_octav, calibrate_octav, pack_octav
from octav_hf.conversion.record import recorded_config
from octav_hf.hub.checkpoint_folder import CheckpointFolder, summary
from octav_hf.packing.manifest import check_files

Edit = tuple[str, float, bytes]


def nested(value: list) -> list:
    """In 100 lists."""
    for _ in range(100):
        value = [value]
    return value


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
    """Why the file is refused; empty if it is not. Other exceptions fail the test."""
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


OURS = ("quantization_config", "architectures")  # the rest of config.json is for Transformers to check
FORMS = ("training", "frozen", "packed", "packed in shards")
json_values = st.recursive(
    st.sampled_from([None, True, False, 0, -1, 1, 4, 10**9, 2**63, 10**30, 0.5, float("nan"), float("inf")])
    | st.sampled_from(["", "octav", "../model.safetensors", "/etc/passwd", "\x1b[2J", "BertModel", "pipeline", "F4"])
    | st.just([]).map(nested),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["a", "*", "clips"]), inner, max_size=2)
    ),
    max_leaves=3,
)
# Shares of the entries of an object, of those of the entry there, and so on; and what becomes of the last one.
changes = st.lists(
    st.tuples(
        st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=4),
        st.sampled_from(["put", "delete", "add"]),
        json_values,
    ),
    min_size=1,
    max_size=2,
)
few = settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint in each form, and next to them a file that must not be opened."""
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    parent = tmp_path_factory.mktemp("forms")
    for form in FORMS:
        torch.manual_seed(0)
        model = BertForQuestionAnswering(BertConfig(vocab_size=10, max_position_embeddings=8, **sizes)).eval()
        apply_octav(model, OctavConfig(module_overrides={"qa_outputs": {"weight_bits": 8}}))
        if form == "frozen":
            calibrate_octav(model, [{"input_ids": torch.arange(8)[None]}], progress_bar=False)
        if form.startswith("packed"):
            pack_octav(model)
        model.save_pretrained(parent / form, max_shard_size="1KB" if form.endswith("shards") else "1GB")
    shutil.copy(parent / "training" / "model.safetensors", parent)
    return parent


def change(value: Any, place: list[float], kind: str, new: Any) -> None:
    """Change an entry of a JSON object in place."""
    inside, key = value, None
    for share in place:
        if not isinstance(inside, dict | list) or not inside:
            break
        value, key = inside, [*(inside if isinstance(inside, dict) else range(len(inside)))][int(share * len(inside))]
        inside = value[key]
    if kind == "delete" and key is not None:
        del value[key]
    elif kind == "put" and key is not None:
        value[key] = new
    else:
        value.append(new) if isinstance(value, list) else value.update(added=new)


def loads_or_says_why(folder: Path) -> None:
    """Exceptions other than these two fail the test."""
    try:
        opened = CheckpointFolder(str(folder))
        assert {file.parent for file in opened.weight_files} == {folder}
        model = opened.load()
        assert summary(opened)["layers"]
    except (ValueError, OSError) as error:
        if not str(error):
            raise AssertionError("the error says nothing") from error
        return
    with torch.no_grad():
        assert model(input_ids=torch.arange(8)[None])[0].shape[:2] == (1, 8)


@pytest.mark.parametrize("form", FORMS)
@few
@given(changes=changes)
def test_changed_configs(forms: Path, form: str, changes: list[tuple[list[float], str, Any]]) -> None:
    path = forms / form / "config.json"
    text = path.read_text()
    config = json.loads(text)
    ours = {name: config[name] for name in OURS}
    for each in changes:
        change(ours if each[0][0] < 0.1 else ours.get("quantization_config", ours), *each)
    path.write_text(json.dumps({name: value for name, value in config.items() if name not in OURS} | ours))
    loads_or_says_why(forms / form)
    path.write_text(text)


@pytest.mark.slow
@few
@given(changes=changes)
def test_changed_indexes(forms: Path, changes: list[tuple[list[float], str, Any]]) -> None:
    path = forms / FORMS[-1] / "model.safetensors.index.json"
    text = path.read_text()
    index = json.loads(text)
    for each in changes:
        change(index, *each)
    path.write_text(json.dumps(index))
    loads_or_says_why(forms / FORMS[-1])
    path.write_text(text)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@few
@given(changes=changes, where=st.sampled_from(["header", "metadata", "record"]))
def test_changed_headers(forms: Path, form: str, changes: list[tuple[list[float], str, Any]], where: str) -> None:
    """Metadata with ``record`` and its hash."""
    path = sorted((forms / form).glob("*.safetensors"))[0]
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    metadata = header["__metadata__"]
    record = json.loads(metadata.get("octav_hf", "{}"))
    for each in changes:
        change({"header": header, "metadata": metadata, "record": record or header}[where], *each)
    if where == "record" and record:
        metadata["octav_hf"] = json.dumps(record)
        metadata["octav_hf_sha256"] = hashlib.sha256(metadata["octav_hf"].encode()).hexdigest()
    written = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(written)) + written + content[8 + length :])
    loads_or_says_why(forms / form)
    path.write_bytes(content)
