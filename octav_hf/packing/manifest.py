"""The record of a packed model's tensors in the metadata of its files, and the check of the files.

The record is JSON under the key ``octav_hf`` of the safetensors metadata, the same in each shard: the quantization
config, and dtype, shape and SHA-256 of each tensor of all shards. Its own SHA-256 is under ``octav_hf_sha256``.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..config import OctavConfig

_RECORD, _DIGEST = "octav_hf", "octav_hf_sha256"
_OTHER_METADATA = {"format": "pt"}  # by Transformers


@dataclass(frozen=True)
class TensorRecord:
    dtype: str
    shape: list[int]
    sha256: str


def describe_tensors(tensors: Mapping[str, Tensor], config: OctavConfig) -> dict[str, str]:
    """The metadata of each file of a model with these ``tensors``."""
    records = {name: vars(_tensor_record(tensor)) for name, tensor in tensors.items()}
    record = {"quantization_config": config.to_dict(), "tensors": records}
    text = json.dumps(record, sort_keys=True, separators=(",", ":"))
    return {_RECORD: text, _DIGEST: _sha256(text.encode())}


def check_files(files: Iterable[str | Path], config: OctavConfig) -> dict[str, TensorRecord]:
    """Read all files of a packed model, compare them with their record and return it, by the names of tensors.

    Raises ``ValueError`` if a file or tensor is damaged, missing or not in the record, or ``config``, from the
    ``config.json`` in the same folder, differs.
    """
    paths = [Path(file) for file in files]
    record: dict[str, TensorRecord] | None = None
    first: Path | None = None
    found: dict[str, Path] = {}
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                recorded = _read_record(path, file.metadata(), config)
                if record is None:
                    record, first = recorded, path
                elif recorded != record:
                    raise _damaged(path, f"its record is not that of {first}: these are files of two models")
                for name in file.keys():  # noqa: SIM118  # not a dictionary
                    _check_tensor(path, name, file.get_tensor(name), record)
                    if name in found:
                        raise _damaged(path, f"{name} is in {found[name]} too")
                    found[name] = path
        except SafetensorError as error:
            raise _damaged(path, f"no safetensors file, or one that is cut off or altered ({error})") from error
    if record is None:
        raise ValueError("a packed model has to have files; there are none")
    missing = sorted(record.keys() - found.keys())
    if missing:
        raise _damaged(", ".join(map(str, paths)), f"{missing[0]} is missing ({len(missing)} in all)")
    return record


def _read_record(path: Path, metadata: Mapping[str, str] | None, config: OctavConfig) -> dict[str, TensorRecord]:
    """The record in the file's metadata, after checking it."""
    metadata = metadata or {}
    expected = {_RECORD, _DIGEST} | _OTHER_METADATA.keys()
    if set(metadata) != expected:
        raise _damaged(path, f"its metadata has the keys {sorted(metadata)}, not {sorted(expected)}")
    for key, value in _OTHER_METADATA.items():
        if metadata[key] != value:
            raise _damaged(path, f"its metadata has {key}={metadata[key]!r}, not {value!r}")
    text = metadata[_RECORD]
    if _sha256(text.encode()) != metadata[_DIGEST]:
        raise _damaged(path, "the record of its tensors in the metadata is altered")
    record: dict[str, Any] = json.loads(text)
    written = OctavConfig.from_dict(record["quantization_config"])
    recorded = written.to_dict() | {"activation_clips": written.clips_of_version_1}
    for field, value in (config.to_dict() | {"activation_clips": config.clips_of_version_1}).items():
        if recorded[field] != value:
            raise ValueError(
                f"{path} was written with {field}={recorded[field]!r}, but the quantization_config of the config.json "
                f"beside it has {value!r}; bring back the config.json that was saved with it"
            )
    return {name: TensorRecord(**entry) for name, entry in record["tensors"].items()}


def _check_tensor(path: Path, name: str, tensor: Tensor, record: Mapping[str, TensorRecord]) -> None:
    if name not in record:
        raise _damaged(path, f"the tensor {name} is not in its record")
    recorded, actual = record[name], _tensor_record(tensor)
    for field in ("dtype", "shape"):
        if getattr(actual, field) != getattr(recorded, field):
            raise _damaged(path, f"{name} has {field} {getattr(actual, field)}, not {getattr(recorded, field)}")
    if actual != recorded:
        raise _damaged(path, f"the values of {name} are altered")


def _tensor_record(tensor: Tensor) -> TensorRecord:
    content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return TensorRecord(str(tensor.dtype).removeprefix("torch."), list(tensor.shape), _sha256(content))


def _sha256(content: Any) -> str:
    return hashlib.sha256(content).hexdigest()


def _damaged(where: Path | str, problem: str) -> ValueError:
    return ValueError(f"{where}: {problem}. The file is damaged or incomplete; download or save it again")
