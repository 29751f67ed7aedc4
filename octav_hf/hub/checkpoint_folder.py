"""Folders of checkpoints: inspecting, loading, uploading, and writing atomically."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import CommitInfo, HfApi, snapshot_download
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PreTrainedModel
from transformers.quantizers.auto import AutoQuantizationConfig

from ..config import OctavConfig
from ..conversion.convert import convert_modules
from ..conversion.modules import activation_quantizers, layers_by_quantizer
from ..conversion.plan import plan_conversion
from ..conversion.verify import float_structure
from ..nn import FakeQuantize
from ..packing.clips_in_files import prepare_frozen
from ..packing.clips_of_version_1 import freeze_version_1, match_version_1
from .model_card import card_of, write_card
from .training_run import TrainingRun

PICKLES = ["*.bin", "*.pt", "*.pth", "*.pkl"]  # neither downloaded nor uploaded: loading one can run any code
_WEIGHTS = ["*.safetensors", "*.safetensors.index.json", "config.json"]
_TRAINER_FILES = ["trainer_state.json", "*_results.json", "*_predictions.json", "*_null_odds.json"]
_NOT_UPLOADED = [*PICKLES, "trainer_state.json", "checkpoint-*/*", "runs/*", "packed/*"]


@dataclass(frozen=True)
class StoredLayer:
    """A layer with a quantized weight in a checkpoint."""

    name: str
    bits: int
    shape: list[int]
    stored: str  # "packed", the dtype of a float weight, or "shared" if stored under another layer's name
    bytes: int
    float32_bytes: int


class CheckpointFolder:
    """A checkpoint of a quantized model, in training form or packed.

    Args:
        source: a folder, or the id of a repository on the Hub, which is downloaded into the cache.

    Raises:
        ValueError: it contains no quantized model.
        OSError: it cannot be found or read.
    """

    def __init__(self, source: str):
        is_folder = Path(source).is_dir()
        self.path = Path(source if is_folder else snapshot_download(source, ignore_patterns=PICKLES))
        config_file = self.path / "config.json"
        if not config_file.is_file():
            raise ValueError(f"{source} has no config.json, so it is no model")
        stored = json.loads(config_file.read_text(encoding="utf-8"))
        quantization = stored.get("quantization_config") or {}
        if quantization.get("quant_method") != "octav":
            raise ValueError(
                f"{source} is not quantized with octav (its quant_method is {quantization.get('quant_method')!r}); "
                "train it after apply_octav, and save it"
            )
        self.format_version: int = quantization.get("format_version", 1)
        self.config: OctavConfig = AutoQuantizationConfig.from_dict(quantization)
        (architecture, *_) = stored.get("architectures") or [""]
        model_class = getattr(transformers, architecture, None)
        if model_class is None:
            raise ValueError(f"{config_file}: Transformers has no model class {architecture!r} (field architectures)")
        self.model_class: type[PreTrainedModel] = model_class

    @property
    def weight_files(self) -> list[Path]:
        """The model's safetensors files; ``ValueError`` if one is missing."""
        index = self.path / "model.safetensors.index.json"
        if index.is_file():
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        else:
            names = {"model.safetensors"}
        files = [self.path / name for name in sorted(names)]
        missing = [str(file) for file in files if not file.is_file()]
        if missing:
            raise ValueError(f"{missing[0]} is missing ({len(missing)} in all)")
        return files

    def load(self) -> PreTrainedModel:
        """The model with its weights; ``ValueError`` if a file or weight is missing, damaged or of another shape."""
        files = ", ".join(map(str, self.weight_files))
        try:
            loaded: Any = self.model_class.from_pretrained(self.path, output_loading_info=True)
        except (SafetensorError, RuntimeError) as error:
            raise ValueError(f"{files}: cut off, or weights of another shape than the model's ({error})") from error
        model, info = loaded
        if info["missing_keys"]:
            raise ValueError(f"{files}: {', '.join(sorted(info['missing_keys']))} missing, which would be random")
        return model

    @cached_property
    def structure(self) -> PreTrainedModel:
        """The quantized model without weights, in training form, on the meta device."""
        model = float_structure(self.model_class, AutoConfig.from_pretrained(self.path))
        convert_modules(model, self.config, plan_conversion(model, self.config, from_file=True))
        prepare_frozen(model, map(str, self.weight_files), all_weights=False)
        freeze_version_1(match_version_1(model, self.config.clips_of_version_1))
        return model

    def layers(self) -> list[StoredLayer]:
        """The layers whose weight is quantized, in the model's order."""
        stored: dict[str, tuple[str, int]] = {}
        for file in self.weight_files:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118  # not a dictionary
                    tensor = opened.get_tensor(name)
                    stored[name] = str(tensor.dtype).removeprefix("torch."), tensor.nbytes
        layers = []
        for name, module in layers_by_quantizer(self.structure, FakeQuantize).items():
            weight = module.get_parameter("weight")
            dtype, size = stored.get(f"{name}.weight", ("shared", 0))
            _, scale_size = stored.get(f"{name}.weight_scale", ("", 0))
            form, bits, shape = "packed" if scale_size else dtype, module.weight_quantizer.num_bits, list(weight.shape)
            layers.append(StoredLayer(name, bits, shape, form, size + scale_size, 4 * weight.numel()))
        return layers

    def write_card(self, name: str) -> None:
        """Write the model card unless a person has written one; ``name`` is what its example loads."""
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
        ``huggingface_hub``. Raises ``ValueError`` if files are damaged, before uploading, or ``HfHubHTTPError``.
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

    def copy_companions(self, folder: Path) -> None:
        """Copy the tokenizer, the card and other files, except weights, pickles and Trainer's, into ``folder``."""
        for path in sorted(self.path.iterdir()):
            if path.is_file() and not any(path.match(pattern) for pattern in (*_WEIGHTS, *_TRAINER_FILES, *PICKLES)):
                shutil.copy(path, folder / path.name)


@contextmanager
def atomic_output_dir(output: Path) -> Iterator[Path]:
    """A temporary folder that is renamed to ``output`` at the end, and removed after an error.

    Raises ``FileExistsError`` if ``output`` exists and is not an empty folder.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"{output} exists already; choose another output")
    output.parent.mkdir(parents=True, exist_ok=True)
    unfinished = output.with_name(f".{output.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    try:
        yield unfinished
        if output.exists():
            output.rmdir()
        unfinished.rename(output)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def summary(folder: CheckpointFolder) -> dict[str, Any]:
    """The facts that ``octav-hf inspect`` shows, for JSON."""
    layers = folder.layers()
    return {
        "form": "packed" if folder.config.packed else "training",
        "format_version": folder.format_version,
        "architecture": type(folder.structure).__name__,
        "quantization_config": folder.config.to_dict(),
        "frozen_clips": sum(quantizer.is_frozen for _, _, quantizer in activation_quantizers(folder.structure)),
        "layers": [vars(layer) for layer in layers],
        "layer_bytes": sum(layer.bytes for layer in layers),
        "layer_float32_bytes": sum(layer.float32_bytes for layer in layers),
        "file_bytes": sum(file.stat().st_size for file in folder.weight_files),
    }
