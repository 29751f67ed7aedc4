"""The record of a packed model's tensors in the metadata of its files, and the check of the files.

The record is JSON under the key ``octav_hf`` of the safetensors metadata, the same in each shard: the quantization
config, and dtype, shape and SHA-256 of each tensor of all shards. The SHA-256 of the record is under
``octav_hf_sha256``. Other keys are ignored, except for ``format``, which Transformers requires.

The hashes detect damaged files. They do not authenticate files: whoever changes a file on purpose can update them.
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

from .._utils.escaping import escaped, shown
from ..config import OctavConfig

_RECORD, _DIGEST = "octav_hf", "octav_hf_sha256"
_FORMAT, _TORCH = "format", "pt"  # required by Transformers


@dataclass(frozen=True)
class TensorRecord:
    dtype: str
    shape: list[int]
    sha256: str


def describe_tensors(tensors: Mapping[str, Tensor], config: OctavConfig) -> dict[str, str]:
    """The metadata to write into each file of a model with these ``tensors``."""
    records = {name: vars(_tensor_record(tensor)) for name, tensor in tensors.items()}
    record = {"quantization_config": config.to_dict(), "tensors": records}
    text = json.dumps(record, sort_keys=True, separators=(",", ":"))
    return {_RECORD: text, _DIGEST: _sha256(text.encode())}


def check_files(files: Iterable[str | Path], config: OctavConfig) -> dict[str, TensorRecord]:
    """Read all files of a packed model, compare them with their record and return it, by names of tensors.

    Args:
        files: all shards.
        config: the config in the ``config.json`` of the same folder.

    Raises:
        ValueError: a file or tensor is damaged, missing or not in the record, or ``config`` differs from the record.
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
                    raise _damaged(path, f"its record differs from that of {first}: these are files of two models")
                for name in file.keys():  # noqa: SIM118  # not a dictionary
                    if name not in record:
                        raise _damaged(path, f"the tensor {escaped(name)} is not in its record")
                    _check_tensor(path, name, file.get_tensor(name), record[name])
                    if name in found:
                        raise _damaged(path, f"{escaped(name)} is also in {found[name]}")
                    found[name] = path
        except (SafetensorError, RuntimeError) as error:  # torch refuses some shapes that safetensors accepts
            raise _damaged(path, f"not a safetensors file, or truncated or altered ({error})") from error
    if record is None:
        raise ValueError("a packed model needs its safetensors files, but there are none")
    missing = sorted(record.keys() - found.keys())
    if missing:
        raise _damaged(", ".join(map(str, paths)), f"{escaped(missing[0])} is missing ({len(missing)} in all)")
    return record


def _read_record(path: Path, metadata: Mapping[str, str] | None, config: OctavConfig) -> dict[str, TensorRecord]:
    """Check the record in the metadata of a file, and return it."""
    metadata = metadata or {}
    expected = {_RECORD, _DIGEST, _FORMAT}
    if not metadata.keys() >= expected:
        raise _damaged(path, f"its metadata has the keys {shown(sorted(metadata))}, not {sorted(expected)}")
    if metadata[_FORMAT] != _TORCH:
        raise _damaged(path, f"its metadata has {_FORMAT}={shown(metadata[_FORMAT])}, not {_TORCH!r}")
    text = metadata[_RECORD]
    if _sha256(text.encode()) != metadata[_DIGEST]:
        raise _damaged(path, "the record of its tensors in the metadata is altered")
    try:
        record = json.loads(text)
        written = OctavConfig.from_dict(record["quantization_config"])
        recorded = written.to_dict() | {"activation_clips": written.clips_of_version_1}
        tensors = {name: TensorRecord(**entry) for name, entry in record["tensors"].items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise _damaged(path, f"the record of its tensors in the metadata is invalid: {escaped(repr(error))}") from error
    for field, value in (config.to_dict() | {"activation_clips": config.clips_of_version_1}).items():
        if recorded[field] != value:
            raise ValueError(
                f"{path} was written with {field}={shown(recorded[field])}, but the quantization_config in the "
                f"config.json next to it has {shown(value)}; restore the config.json that was saved with it"
            )
    return tensors


def _check_tensor(path: Path, name: str, tensor: Tensor, recorded: TensorRecord) -> None:
    actual = _tensor_record(tensor)
    for field in ("dtype", "shape"):
        if getattr(actual, field) != getattr(recorded, field):
            expected = escaped(str(getattr(recorded, field)))
            raise _damaged(path, f"{escaped(name)} has {field} {getattr(actual, field)}, not {expected}")
    if actual != recorded:
        raise _damaged(path, f"the values of {escaped(name)} are altered")


def _tensor_record(tensor: Tensor) -> TensorRecord:
    content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return TensorRecord(str(tensor.dtype).removeprefix("torch."), list(tensor.shape), _sha256(content))


def _sha256(content: Any) -> str:
    return hashlib.sha256(content).hexdigest()


def _damaged(where: Path | str, problem: str) -> ValueError:
    return ValueError(f"{where}: {problem}. The file is damaged or incomplete; download or save it again")
