"""Folders that are damaged, mixed from two exports or of other versions are refused with advice."""

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import onnx
import pytest

from octav_hf.export import extra, to_onnx, verify_onnx
from octav_hf.export.folder import RECORD_FILE, read_model, write_record

from .conftest import Batch


def test_as_it_was_written(copied: Path) -> None:
    model, record = read_model(copied)
    assert model.opset_import[0].version == record["opset"] == 21
    assert record["session_options"] == {}  # which only weights of 8 bits need


@pytest.mark.parametrize("name", ["model.onnx", "config.json", RECORD_FILE])
def test_a_missing_file(copied: Path, name: str) -> None:
    (copied / name).unlink()
    with pytest.raises(ValueError, match=f"{name}.* missing.*export"):
        read_model(copied)


@pytest.mark.parametrize("kept", [0, 100, -1])
def test_a_file_that_is_cut_off(copied: Path, kept: int) -> None:
    file = copied / "model.onnx"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"model\.onnx"):
        read_model(copied)


def test_a_weight_that_was_altered(copied: Path) -> None:
    model = onnx.load(copied / "model.onnx")
    (weight,) = (tensor for tensor in model.graph.initializer if tensor.name == "qa_outputs.int4_weight.packed")
    weight.raw_data = bytes([weight.raw_data[0] ^ 1]) + weight.raw_data[1:]
    onnx.save(model, copied / "model.onnx")
    with pytest.raises(ValueError, match=r"model\.onnx missing, altered or from another export"):
        read_model(copied)


def test_the_config_of_another_model(copied: Path) -> None:
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | {"hidden_size": 64}))
    with pytest.raises(ValueError, match=r"config\.json missing, altered or from another export"):
        read_model(copied)


def test_another_opset(copied: Path) -> None:
    model = onnx.load(copied / "model.onnx")
    model.opset_import[0].version = 22
    onnx.save(model, copied / "model.onnx")
    with pytest.raises(ValueError, match=r"has opset 22, but only 21"):
        read_model(copied)


@pytest.mark.parametrize("record", ["{", "[]", "{}", '{"format_version": 1, "sha256": {}}'])
def test_a_record_of_another_form(copied: Path, record: str) -> None:
    (copied / RECORD_FILE).write_text(record)
    with pytest.raises(ValueError, match=RECORD_FILE):
        read_model(copied)


@pytest.mark.parametrize("found", ["1.31.9", None])
def test_a_runtime_that_is_too_old_or_missing(
    exported: tuple[Any, Path, Batch], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, found: str | None
) -> None:
    version = importlib.metadata.version

    def version_of(package: str) -> str:
        if package != "onnxruntime":
            return version(package)
        if found is None:
            raise importlib.metadata.PackageNotFoundError
        return found

    monkeypatch.setattr(extra, "version", version_of)
    model, folder, batch = exported
    problem = "is not installed" if found is None else "1.31.9 is too old"
    with pytest.raises(
        ImportError, match=rf"onnxruntime>=1.32, but onnxruntime {problem}: pip install 'octav-hf\[onnx\]"
    ):
        verify_onnx(model, folder, batch)
    with pytest.raises(ImportError, match="too old|not installed"):
        to_onnx(model, tmp_path / "new", batch)
    assert not (tmp_path / "new").exists()


def rewrite(folder: Path, model: onnx.ModelProto) -> None:
    """Replace the file, with a record that fits."""
    record = json.loads((folder / RECORD_FILE).read_text())
    onnx.save(model, folder / "model.onnx")
    write_record(folder, {name: record[name] for name in record if name not in ("format_version", "opset", "sha256")})


def test_verification_finds_a_product_in_float(exported: tuple[Any, Path, Batch], copied: Path) -> None:
    model, _, batch = exported
    file = onnx.load(copied / "model.onnx")
    (node,) = (node for node in file.graph.node if node.name == "qa_outputs/MatMul")
    (source,) = (each for each in file.graph.node if node.input[0] in each.output)
    assert source.op_type == "DequantizeLinear"
    source.op_type = "Cast"
    del source.input[1:]
    source.attribute.append(onnx.helper.make_attribute("to", onnx.TensorProto.FLOAT))
    rewrite(copied, file)
    with pytest.raises(ValueError, match=r"computes 16 integer .* has 17 .*; unexpectedly in float: qa_outputs/"):
        verify_onnx(model, copied, batch)


def test_verification_finds_other_weights(exported: tuple[Any, Path, Batch], copied: Path) -> None:
    model, _, batch = exported
    file = onnx.load(copied / "model.onnx")
    (scale,) = (tensor for tensor in file.graph.initializer if tensor.name == "qa_outputs.weight_scale")
    scale.CopyFrom(onnx.numpy_helper.from_array(-onnx.numpy_helper.to_array(scale), scale.name))
    rewrite(copied, file)
    with pytest.raises(ValueError, match="outputs differ from the model's by 2"):
        verify_onnx(model, copied, batch)
