"""Checkpoint folders: inspect, load and upload them, and copy the files beside the weights."""

import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import CommitInfo, HfApi, snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from .._utils.escaping import escaped, shown
from .._utils.json_file import read_json
from ..config import QUANT_METHOD, OctavConfig
from ..conversion.convert import convert_modules
from ..conversion.modules import layers_by_quantizer
from ..conversion.plan import plan_conversion
from ..conversion.verify import float_structure
from ..nn import FakeQuantize
from ..nn.granularity import ACTIVATION_GRANULARITIES
from ..packing.clips_in_files import prepare_frozen
from ..packing.clips_of_version_1 import freeze_version_1, match_version_1
from ..packing.names import SCALE, names_in_model
from .model_card import card_of, write_card
from .output_dir import UNFINISHED
from .training_run import TrainingRun

PICKLES = ["*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle", "*.joblib"]
"""Never downloaded, uploaded or copied, because loading one can run arbitrary code."""
_WEIGHTS = ["*.safetensors", "*.safetensors.index.json", "config.json"]
_TRAINER_FILES = ["trainer_state.json", "*_results.json", "*_predictions.json", "*_null_odds.json"]
_NOT_UPLOADED = [*PICKLES, "trainer_state.json", "checkpoint-*/*", "runs/*", "packed/*", f"{UNFINISHED}*/*"]
_MODULES = "modules.json"  # of Sentence Transformers: lists the parts of a model, including the transformer
_FROZEN_ACTIVATION = re.compile(rf"(?:.*\.)?({'|'.join(ACTIVATION_GRANULARITIES)})_quantizer\.(unsigned_)?clips")
_FROZEN_WEIGHT = re.compile(r"(?:.*\.)?weight_quantizer\.clips")


@dataclass(frozen=True)
class StoredLayer:
    """A layer with a quantized weight in a checkpoint."""

    name: str
    bits: int
    shape: list[int]
    stored: str  # "packed", the dtype of a float weight, or "shared" if stored under another name
    bytes: int  # 0 if shared
    float32_bytes: int  # of as many values in float32; 0 if shared


class CheckpointFolder:
    """A checkpoint of a quantized model, in training form or packed.

    Args:
        source: a folder, or the id of a repository on the Hub, which is downloaded into the cache.

    Raises:
        ValueError: it contains no quantized model.
        OSError: it cannot be found or read.
    """

    def __init__(self, source: str):
        self.path = Path(source) if Path(source).is_dir() else _downloaded(source)
        config_file = self.path / "config.json"
        if not config_file.is_file():
            raise ValueError(f"{source} has no config.json, so it is not a model{self._transformer_elsewhere()}")
        stored = read_json(config_file)
        quantization = (stored.get("quantization_config") or {}) if isinstance(stored, dict) else None
        if not isinstance(quantization, dict):
            raise ValueError(f"{config_file} must be a JSON object, and so must its quantization_config")
        if quantization.get("quant_method") != QUANT_METHOD:
            raise ValueError(
                f"{source} is not quantized with octav (its quant_method is "
                f"{shown(quantization.get('quant_method'))}); train it after apply_octav, and save it"
            )
        self.config: OctavConfig = OctavConfig.from_dict(quantization)
        self.format_version: int = quantization.get("format_version", 1)
        if "transformers_weights" in stored:
            raise ValueError(f"{config_file} has transformers_weights, which names other files; remove it")
        self.model_class = _model_class(stored.get("architectures"), config_file)

    @property
    def weight_files(self) -> list[Path]:
        """The model's safetensors files; ``ValueError`` if one is missing, or the index names a file elsewhere.

        Files may be links, as in the Hub's cache: only users of this machine can create links, and their targets are
        read as tensors. An index, in contrast, may come from anybody, so names with a path are refused.
        """
        index = self.path / "model.safetensors.index.json"
        names = {"model.safetensors"}  # takes precedence over an index, as in Transformers
        if index.is_file() and not (self.path / "model.safetensors").is_file():
            stored = read_json(index)
            files_of_tensors = stored.get("weight_map") if isinstance(stored, dict) else None
            if not isinstance(files_of_tensors, dict) or not files_of_tensors:
                raise ValueError(f"{index} must be a JSON object with a weight_map of tensor names to file names")
            for name in files_of_tensors.values():
                if not _is_plain_name(name) or not name.endswith(".safetensors"):
                    raise ValueError(
                        f"{index}: weight_map names the file {shown(name)}; it must be the name of a .safetensors file "
                        "in the same folder, without a path"
                    )
            names = set(files_of_tensors.values())
        files = [self.path / name for name in sorted(names)]
        missing = [str(file) for file in files if not file.is_file()]
        if missing:
            raise ValueError(f"{missing[0]} is missing ({len(missing)} in all)")
        return files

    def load(self) -> PreTrainedModel:
        """The model with its weights; ``ValueError`` if a file or weight is missing, damaged or of another shape."""
        files = ", ".join(map(str, self.weight_files))
        try:
            loaded: Any = self.model_class.from_pretrained(self.path, output_loading_info=True, trust_remote_code=False)
        except (SafetensorError, RuntimeError) as error:
            raise ValueError(f"{files}: truncated, or weights have other shapes than the model ({error})") from error
        except (OSError, ValueError):
            raise
        except Exception as error:  # a model class may raise anything for invalid sizes
            raise ValueError(
                f"{self.path}: cannot build a {self.model_class.__name__} from config.json and the weights ({error!r})"
            ) from error
        model, info = loaded
        if info["missing_keys"]:
            raise ValueError(
                f"{files}: {', '.join(sorted(info['missing_keys']))} missing, so these weights would be random"
            )
        return model

    @cached_property
    def structure(self) -> PreTrainedModel:
        """The quantized model without weights, in training form, on the meta device."""
        model = float_structure(self.model_class, self._model_config())
        convert_modules(model, self.config, plan_conversion(model, self.config, from_file=True))
        prepare_frozen(model, map(str, self.weight_files), frozen_weights=())
        freeze_version_1(match_version_1(model, self.config.clips_of_version_1))
        return model

    @cached_property
    def _stored(self) -> dict[str, tuple[str, int]]:
        """Name in the model -> dtype and bytes, for the tensors in the files."""
        stored: dict[str, tuple[str, int]] = {}
        for file in self.weight_files:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118  # not a dictionary
                    tensor = opened.get_tensor(name)
                    stored[name] = str(tensor.dtype).removeprefix("torch."), tensor.nbytes
        in_model = names_in_model(stored, self.structure)
        return {name: stored[in_file] for name, (in_file, _) in in_model.items()}

    @property
    def frozen_activations(self) -> int:
        """The number of activations whose clips are frozen."""
        in_config = sum(len(operands) for operands in self.config.clips_of_version_1.values())
        return in_config + sum(_FROZEN_ACTIVATION.fullmatch(name) is not None for name in self._stored)

    @property
    def frozen_weights(self) -> int:
        """The number of weights whose clips are frozen; in packed form, the scales give the clips."""
        if self.config.packed:
            layers = [name.removesuffix(f".{SCALE}") for name in self._stored if name.endswith(f".{SCALE}")]
            return sum(settings.frozen_weight_clips for settings in self.config.settings_for(layers).values())
        return sum(_FROZEN_WEIGHT.fullmatch(name) is not None for name in self._stored)

    def layers(self) -> list[StoredLayer]:
        """The layers with a quantized weight, in the order of the model's modules."""
        stored = self._stored
        layers = []
        for name, module in layers_by_quantizer(self.structure, FakeQuantize).items():
            weight = module.get_parameter("weight")
            dtype, size = stored.get(f"{name}.weight", ("shared", 0))
            _, scale_size = stored.get(f"{name}.weight_scale", ("", 0))
            form, bits, shape = "packed" if scale_size else dtype, module.weight_quantizer.num_bits, list(weight.shape)
            float32_size = 0 if form == "shared" else 4 * weight.numel()
            layers.append(StoredLayer(name, bits, shape, form, size + scale_size, float32_size))
        return layers

    def write_card(self, name: str) -> None:
        """Write the model card unless a person has written one; its example loads ``name``."""
        write_card(self.path, card_of(self.structure, self.config, TrainingRun.load(self.path), name=name))

    def push(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        revision: str | None = None,
        commit_message: str | None = None,
        create_pr: bool = False,
        token: str | None = None,
    ) -> CommitInfo:
        """Upload the checkpoint and its card in one commit; the repository is created if it does not exist.

        Pickles, Trainer's checkpoints and logs, and a packed form in ``packed/`` are left out. Arguments are those of
        ``huggingface_hub``.

        Raises:
            ValueError: files are damaged; nothing is uploaded.
            HfHubHTTPError: the Hub refuses the upload.
        """
        self.load()
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        self.write_card(repo_id)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=self.path,
            commit_message=commit_message or f"Upload {type(self.structure).__name__}",
            revision=revision,
            create_pr=create_pr or None,
            ignore_patterns=_NOT_UPLOADED,
        )

    def copy_companions(self, folder: Path) -> list[str]:
        """Copy the tokenizer, the card, other files and the subfolders listed in ``modules.json`` into ``folder``.

        Weights, Trainer's files and pickles beside them are not copied.

        Returns:
            What else was left out: subfolders that ``modules.json`` does not list, pickles in subfolders, and links to
            files outside the checkpoint, which may be any file of this machine.

        Raises:
            ValueError: ``modules.json`` is invalid, or lists a folder outside the checkpoint.
        """
        left_out = []
        copied = self._module_folders()
        for path in sorted(self.path.iterdir()):
            is_weights_or_trainers = any(path.match(each) for each in (*_WEIGHTS, *_TRAINER_FILES, *PICKLES))
            if path.name.startswith(UNFINISHED) or (path.is_file() and is_weights_or_trainers):
                continue
            if path.is_dir() and path.name not in copied:
                left_out.append(f"{escaped(path.name)}/ ({_MODULES} does not list it)")
            else:
                left_out += self._copy(path, folder / path.name)
        return left_out

    def _copy(self, path: Path, target: Path) -> Iterator[str]:
        """Copy a file or folder recursively; yields what is left out."""
        name = escaped(str(path.relative_to(self.path)))
        if path.is_dir() and not path.is_symlink():
            target.mkdir()
            for part in sorted(path.iterdir()):
                if not part.name.startswith(UNFINISHED):
                    yield from self._copy(part, target / part.name)
        elif not path.is_file() or not self._is_inside(path):
            yield f"{name} (a link to outside of the checkpoint, or not a file)"
        elif any(path.match(pattern) for pattern in PICKLES):
            yield f"{name} (a pickle)"
        else:
            shutil.copy(path, target)

    def _module_folders(self) -> list[str]:
        """The subfolders that ``modules.json`` lists, in its order; ``ValueError`` for a path."""
        path = self.path / _MODULES
        modules = read_json(path) if path.is_file() else []
        if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
            raise ValueError(f"{path} must be a list of JSON objects, one per module")
        names = [module.get("path", "") for module in modules]
        for name in names:
            if name != "" and not _is_plain_name(name):
                raise ValueError(
                    f"{path} lists the folder {shown(name)}; it must be the name of a subfolder, not a path"
                )
        return [name for name in names if name]

    def _is_inside(self, path: Path) -> bool:
        """Whether ``path`` resolves to a file in this folder, or in the Hub's cache of the same repository."""
        folder = self.path.resolve()
        if folder.parent.name == "snapshots":  # the cache has links to ../../blobs
            folder = folder.parent.parent
        return path.resolve().is_relative_to(folder)

    def _transformer_elsewhere(self) -> str:
        """What to do if Sentence Transformers has stored the transformer in a subfolder."""
        for name in self._module_folders():
            file = self.path / name / "config.json"
            stored = read_json(file) if file.is_file() else None
            if isinstance(stored, dict) and "architectures" in stored:
                return (
                    f"; according to {_MODULES}, the model is in {name}/: pass {self.path / name} instead, and replace "
                    f"{name}/ with the output in a copy of {self.path}"
                )
        return ""

    def _model_config(self) -> Any:
        """The model's config, read by its known class, so that config.json cannot make Transformers load code."""
        config_class: Any = self.model_class.config_class
        return config_class.from_pretrained(self.path)


def _downloaded(repo_id: str) -> Path:
    """The folder in the cache of a repository on the Hub."""
    try:
        return Path(snapshot_download(repo_id, ignore_patterns=PICKLES))
    except (HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError) as error:
        raise FileNotFoundError(f"there is no folder {repo_id}, and no such repository on the Hub: {error}") from error


def _model_class(architectures: Any, config_file: Path) -> type[PreTrainedModel]:
    """The class named by ``architectures`` in a config.json, which must be a Transformers model."""
    architecture = architectures[0] if isinstance(architectures, list) and architectures else None
    model_class: Any = None
    # dir() lists what Transformers exports without importing it.
    if isinstance(architecture, str) and architecture in dir(transformers):
        try:
            model_class = getattr(transformers, architecture)
        except (ImportError, RuntimeError) as error:
            raise ValueError(
                f"{config_file}: {architecture} needs a package that is not installed ({error})"
            ) from error
    is_model = isinstance(model_class, type) and issubclass(model_class, PreTrainedModel)
    if not is_model or model_class.config_class is None:
        raise ValueError(f"{config_file}: Transformers has no model class {shown(architecture)} (field architectures)")
    return model_class


def _is_plain_name(name: Any) -> bool:
    """Whether this is the name of a file or folder that is not hidden, without a path."""
    return isinstance(name, str) and name.isprintable() and name[:1] not in ("", ".") and not re.search(r"[/\\:]", name)


def summary(folder: CheckpointFolder) -> dict[str, Any]:
    """The facts that ``octav-hf inspect`` shows, for JSON."""
    layers = folder.layers()
    return {
        "form": "packed" if folder.config.packed else "training",
        "format_version": folder.format_version,
        "architecture": type(folder.structure).__name__,
        "quantization_config": folder.config.to_dict(),
        "activation_granularity": {operand: folder.config.granularity(operand) for operand in ACTIVATION_GRANULARITIES},
        "frozen_clips": folder.frozen_activations,
        "frozen_weight_clips": folder.frozen_weights,
        "layers": [vars(layer) for layer in layers],
        "layer_bytes": sum(layer.bytes for layer in layers),
        "layer_float32_bytes": sum(layer.float32_bytes for layer in layers),
        "file_bytes": sum(file.stat().st_size for file in folder.weight_files),
    }
