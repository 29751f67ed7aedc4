"""The record of an exported folder, which tells whether its files belong together."""

import hashlib
import json
from pathlib import Path
from typing import Any

from .._utils.json_file import read_json
from .recorded_operands import OPSET

MODEL_FILE, RECORD_FILE = "model.onnx", "octav_export.json"
_FORMAT_VERSION = 1


def write_record(folder: Path, facts: dict[str, Any]) -> None:
    """Write ``octav_export.json``: the facts, and the SHA-256 of ``config.json`` and of all ONNX files."""
    hashes = {path.name: _sha256(path) for path in sorted(folder.iterdir()) if _is_recorded(path)}
    record = {"format_version": _FORMAT_VERSION, "opset": OPSET, **facts, "sha256": hashes}
    (folder / RECORD_FILE).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def read_model(folder: Path) -> tuple[Any, dict[str, Any]]:
    """The ``onnx.ModelProto`` in ``folder``, and its record.

    Raises:
        ValueError: a file is missing, truncated, altered or from another export; or the opset differs.
    """
    import onnx

    path = folder / MODEL_FILE
    for needed in (path, folder / RECORD_FILE):
        if not needed.is_file():
            raise ValueError(f"{needed} is missing; write the folder with octav_hf.export.to_onnx or octav-hf export")
    try:
        model = onnx.load(path)
    except Exception as error:  # from the protobuf library, or about files
        raise ValueError(
            f"{path} or a file next to it is truncated or damaged ({error}); export the model again"
        ) from error
    opsets = {entry.domain or "ai.onnx": entry.version for entry in model.opset_import}
    if opsets.get("ai.onnx") != OPSET:
        raise ValueError(
            f"{path} has opset {opsets.get('ai.onnx')}, but only {OPSET}, which to_onnx writes, is known to run with "
            "integers; export the model again"
        )
    record = read_json(folder / RECORD_FILE)
    is_record = isinstance(record, dict) and record.get("format_version") == _FORMAT_VERSION
    if not is_record or not all(isinstance(record.get(field), dict) for field in ("sha256", "session_options")):
        raise ValueError(f"{folder / RECORD_FILE} is not a record that octav_hf wrote; export the model again")
    hashes, present = record["sha256"], {each.name: _sha256(each) for each in folder.iterdir() if _is_recorded(each)}
    wrong = sorted(name for name in hashes.keys() | present.keys() if hashes.get(name) != present.get(name))
    if wrong:
        raise ValueError(
            f"{folder}: {', '.join(wrong)} missing, altered or from another export (SHA-256 in {RECORD_FILE}); export "
            "the model again"
        )
    return model, record


def _is_recorded(path: Path) -> bool:
    return path.name == "config.json" or path.name.startswith(MODEL_FILE)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
