"""Find complete checkpoints of Transformers' Trainer without unpickling anything.

Trainer writes ``checkpoint-N`` in place: the model and ``training_args.bin``, then optimizer, scheduler and random
states, and ``trainer_state.json`` last (``Trainer._save_checkpoint``). A run that is killed while saving leaves an
incomplete folder, which ``get_last_checkpoint`` still returns. If the files of optimizer or random generators are
missing, ``Trainer.train`` silently starts with new ones.
"""

import json
import logging
import re
import zipfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

logger = logging.getLogger(__name__)

_NAME = re.compile(r"checkpoint-(\d+)")
_STATE, _ARGUMENTS = "trainer_state.json", "training_args.bin"
_WEIGHTS, _INDEX, _ADAPTER = "model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors"
_OPTIMIZER, _SCHEDULER, _RNG = "optimizer.pt", "scheduler.pt", "rng_state.pth"
_PROGRESS = (_OPTIMIZER, _SCHEDULER, "scaler.pt", "rng_state*.pth")
_UNFINISHED = "checkpoint-is-incomplete.txt"  # exists while TrainingArguments.enable_jit_checkpoint saves


def last_whole_checkpoint(output_dir: str | Path) -> str | None:
    """Return the newest complete checkpoint of a training run.

    Newer incomplete folders are skipped, each with a warning that tells why. Pass the result to
    ``Trainer.train(resume_from_checkpoint=...)``, where ``None`` starts from the beginning.

    A checkpoint is complete if

    - ``trainer_state.json`` exists and its ``global_step`` is the folder's N,
    - the weights exist, as ``model.safetensors``, as shards with an index, or as PEFT adapters; each file has the
      length given by its header and contains every tensor that the index lists for it,
    - ``training_args.bin``, ``optimizer.pt``, ``scheduler.pt`` and ``rng_state.pth`` (with several processes,
      ``rng_state_0.pth``, ``rng_state_1.pth`` and so on) exist, and these and ``scaler.pt`` are complete zip archives,
    - every other ``.json`` file in the folder, such as ``config.json``, is valid JSON.

    A folder without any state of optimizer, scheduler, scaler and random generators counts as saved with
    ``TrainingArguments.save_only_model``. It is returned with a warning that training does not continue exactly.

    The following is not detected:

    - changed values in a file of the right length,
    - missing files that training does not need (``config.json``, the tokenizer),
    - missing generator states of the last processes if there are three or more (only a pickle records their number),
    - a save into the folder of an older complete checkpoint that was interrupted between two files, so that some are
      old and some new; delete later checkpoints before you resume from an earlier one.

    Checkpoints of DeepSpeed and sharded FSDP consist of other files and count as incomplete.

    Args:
        output_dir: ``TrainingArguments.output_dir``; need not exist. ``NotADirectoryError`` if it is a file.

    Returns:
        The folder's path, or ``None`` if no checkpoint is complete.
    """
    folder = Path(output_dir)
    if not folder.exists():
        return None
    steps = {path: int(match[1]) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))}
    for path in sorted((path for path in steps if path.is_dir()), key=steps.__getitem__, reverse=True):
        try:
            check_checkpoint(path)
        except ValueError as error:
            logger.warning(f"Skipped: {error}")
            continue
        return str(path)
    return None


def check_checkpoint(checkpoint: str | Path) -> None:
    """Raise ``ValueError`` unless a folder is a complete checkpoint; see ``last_whole_checkpoint``.

    The folder may have any name. Logs a warning if it contains only the model, as with ``save_only_model``.
    """
    folder = Path(checkpoint)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a checkpoint: there is no such folder")
    try:
        _check_state(folder)
        _check_weights(folder)
        for path in sorted(folder.glob("*.json")):
            _read_json(path)
        _check_archive(folder / _ARGUMENTS)
        has_progress = _check_progress(folder)
    except ValueError as error:
        raise ValueError(f"{folder} is not a complete checkpoint: {error}") from error
    if not has_progress:
        logger.warning(
            f"{folder} contains only the model, as if it was saved with save_only_model. Optimizer, learning rate "
            f"schedule and random generators start anew, so training ends with other weights than an uninterrupted run"
        )


def _check_state(folder: Path) -> None:
    if (folder / _UNFINISHED).exists():
        raise ValueError(f"the save did not finish ({_UNFINISHED} exists)")
    state = _read_json(folder / _STATE)
    step = state.get("global_step") if isinstance(state, dict) else None
    match = _NAME.fullmatch(folder.name)
    if not isinstance(step, int) or (match and step != int(match[1])):
        raise ValueError(f"{_STATE} has global_step={step!r}")


def _check_weights(folder: Path) -> None:
    """Check the weights that Trainer would load, in its order of preference."""
    if (folder / _WEIGHTS).exists():
        _names_in_safetensors(folder / _WEIGHTS)
    elif (folder / _INDEX).exists():
        _check_shards(folder)
    else:
        # PEFT saves the adapter "default" in the folder itself, others in folders of their names.
        adapters = [*folder.glob(_ADAPTER), *sorted(folder.glob(f"*/{_ADAPTER}"))]
        if not adapters:
            raise ValueError(f"there are no weights: no {_WEIGHTS}, {_INDEX} or {_ADAPTER}")
        for path in adapters:
            _names_in_safetensors(path)
            _read_json(path.with_name("adapter_config.json"))


def _check_shards(folder: Path) -> None:
    index = _read_json(folder / _INDEX)
    shard_of = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(shard_of, dict) or not shard_of or not all(isinstance(name, str) for name in shard_of.values()):
        raise ValueError(f"{_INDEX} has no weight_map")
    for shard in sorted(set(shard_of.values())):
        missing = {name for name, place in shard_of.items() if place == shard} - _names_in_safetensors(folder / shard)
        if missing:
            raise ValueError(f"{shard} has no tensor {min(missing)}, which {_INDEX} lists")


def _check_progress(folder: Path) -> bool:
    """Check the states of optimizer, scheduler, scaler and random generators; ``False`` if there are none."""
    present = {path.name for pattern in _PROGRESS for path in folder.glob(pattern)}
    if not present:
        return False
    processes = len(list(folder.glob("rng_state_*.pth")))  # a single process writes no number
    rng_states = [f"rng_state_{rank}.pth" for rank in range(max(processes, 2))] if processes else [_RNG]
    for name in sorted(present.union([_OPTIMIZER, _SCHEDULER], rng_states)):
        _check_archive(folder / name)
    return True


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise ValueError(f"{path.name} is missing") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} is truncated or not JSON ({error})") from error


def _names_in_safetensors(path: Path) -> set[str]:
    """The names of the tensors in a file, whose length is checked."""
    if not path.is_file():
        raise ValueError(f"{path.name} is missing")
    try:
        with safe_open(path, framework="pt") as file:  # compares the length
            return set(file.keys())
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path.name} is truncated or not a safetensors file ({error})") from error


def _check_archive(path: Path) -> None:
    """Check a file written by ``torch.save``, a zip archive with its directory at the end."""
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                archive.open(entry).close()  # compares the entry's header with the directory
    except FileNotFoundError as error:
        raise ValueError(f"{path.name} is missing") from error
    # RuntimeError, including NotImplementedError: the archive appears to be encrypted or of a later version.
    except (OSError, EOFError, ValueError, RuntimeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path.name} is truncated or not a torch.save file ({error})") from error
