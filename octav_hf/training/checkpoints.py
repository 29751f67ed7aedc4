"""Which checkpoint folders of Transformers' Trainer are whole, found without unpickling anything.

Trainer writes ``checkpoint-N`` in place: the model first, then the optimizer, the scheduler and the states of the
random number generators, and ``trainer_state.json`` last (``Trainer._save_checkpoint`` of Transformers 5.23). A run
that is killed meanwhile leaves a folder that ``transformers.trainer_utils.get_last_checkpoint`` still returns. Of what
is missing in it, ``Trainer.train`` skips the optimizer and the generators without a word.
"""

import json
import logging
import pickletools
import re
import zipfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

logger = logging.getLogger(__name__)

_NAME = re.compile(r"checkpoint-(\d+)")
_STATE, _ARGUMENTS = "trainer_state.json", "training_args.bin"
_WEIGHTS, _INDEX, _ADAPTER = "model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors"
_OPTIMIZER, _SCHEDULER, _SCALER, _RNG = "optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state.pth"
_UNFINISHED = "checkpoint-is-incomplete.txt"  # of TrainingArguments.enable_jit_checkpoint, removed at the end
# RuntimeError, and NotImplementedError with it: to zipfile it is an archive that is encrypted or of a later version.
_DAMAGED_ARCHIVE = (OSError, EOFError, ValueError, RuntimeError, zipfile.BadZipFile)
_NUMBERING = ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE")  # operations of a pickle


def last_whole_checkpoint(output_dir: str | Path) -> str | None:
    """The newest checkpoint of a training run that was written to its end.

    Each newer folder that is not whole is passed over with a warning that says why. Pass the result to
    ``Trainer.train(resume_from_checkpoint=...)``; None there starts afresh.

    A checkpoint is whole if

    - ``trainer_state.json`` is there and its ``global_step`` is the folder's N,
    - the weights are there, as ``model.safetensors``, as shards with their index, or as adapters of PEFT, and every
      such file has the length that its header says, and every tensor that the index lists,
    - ``training_args.bin``, ``optimizer.pt``, ``scheduler.pt`` and ``rng_state.pth`` are there (after training in n
      processes ``rng_state_0.pth`` to ``rng_state_{n-1}.pth``), and these and ``scaler.pt`` are complete zip archives,
    - every other ``.json`` file in it, such as ``config.json``, is JSON.

    A run with ``TrainingArguments.save_only_model`` saves no optimizer, scheduler or generators, so they are not looked
    for. Its checkpoints are returned too, with a warning, since training goes on differently from them. That field and
    n are read from ``training_args.bin`` by going through the operations of its pickle, none of which is carried out.

    Not seen are values that were altered in a file of the right length, and the lack of files that training does not go
    on from (``config.json``, the tokenizer). Nor is it seen that the save of a run with other arguments was interrupted
    in the folder of an older whole checkpoint, so remove those of later steps before training on from an earlier one.
    Checkpoints by DeepSpeed and by sharded FSDP, which have other files, count as not whole.

    Args:
        output_dir: ``TrainingArguments.output_dir``, the folder of the ``checkpoint-N``; it need not exist.

    Returns:
        The folder's path, or None where no checkpoint is whole.

    Raises:
        NotADirectoryError: ``output_dir`` is a file.
    """
    folder = Path(output_dir)
    if not folder.exists():
        return None
    steps = {path: int(match[1]) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))}
    for path in sorted((path for path in steps if path.is_dir()), key=steps.__getitem__, reverse=True):
        try:
            check_checkpoint(path)
        except ValueError as error:
            logger.warning(f"Passed over: {error}")
            continue
        return str(path)
    return None


def check_checkpoint(checkpoint: str | Path) -> None:
    """Raise an error unless a folder is a whole checkpoint, as `last_whole_checkpoint` defines it.

    A warning is logged if it was saved with ``save_only_model``.

    Args:
        checkpoint: the folder. Only if its name is ``checkpoint-N`` has its ``global_step`` to be N.

    Raises:
        ValueError: something is missing or damaged; the message names the folder and the file.
    """
    folder = Path(checkpoint)
    if not folder.is_dir():
        raise ValueError(f"{folder} is no checkpoint: there is no such folder")
    try:
        _check_state(folder)
        _check_weights(folder)
        for path in sorted(folder.glob("*.json")):
            _read_json(path)
        _check_archive(folder / _ARGUMENTS)
        model_only = _argument(folder / _ARGUMENTS, "save_only_model")
        if not model_only:
            _check_progress(folder)
    except ValueError as error:
        raise ValueError(f"{folder} is not a whole checkpoint: {error}") from error
    if model_only:
        logger.warning(
            f"{folder} was saved with save_only_model: the optimizer, the learning rate's schedule and the random "
            f"numbers start anew, so training ends with other weights than without the interruption"
        )


def _check_state(folder: Path) -> None:
    if (folder / _UNFINISHED).exists():
        raise ValueError(f"{_UNFINISHED} says so")
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
            raise ValueError(f"there are no weights, neither {_WEIGHTS}, {_INDEX} nor {_ADAPTER}")
        for path in adapters:
            _names_in_safetensors(path)
            _read_json(path.with_name("adapter_config.json"))


def _check_shards(folder: Path) -> None:
    index = _read_json(folder / _INDEX)
    shard_of = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(shard_of, dict) or not shard_of:
        raise ValueError(f"{_INDEX} has no weight_map")
    for shard in sorted(set(shard_of.values())):
        missing = {name for name, place in shard_of.items() if place == shard} - _names_in_safetensors(folder / shard)
        if missing:
            raise ValueError(f"{shard} has no tensor {min(missing)}, which {_INDEX} lists")


def _check_progress(folder: Path) -> None:
    """Check the states of the optimizer, the schedule, the loss scaler if there is one, and the random numbers."""
    _check_archive(folder / _OPTIMIZER)
    _check_archive(folder / _SCHEDULER)
    if (folder / _SCALER).exists():
        _check_archive(folder / _SCALER)
    processes = _argument(folder / _ARGUMENTS, "num_processes")
    if processes is None:  # not recorded; at least there must be no gap
        processes = len(list(folder.glob("rng_state_*.pth"))) or 1
    for name in [_RNG] if processes == 1 else [f"rng_state_{process}.pth" for process in range(processes)]:
        _check_archive(folder / name)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise ValueError(f"{path.name} is missing") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"{path.name} is cut off or no JSON ({error})") from error


def _names_in_safetensors(path: Path) -> set[str]:
    """The names of the tensors in a file, whose length must be what its header says."""
    if not path.is_file():
        raise ValueError(f"{path.name} is missing")
    try:
        with safe_open(path, framework="pt") as file:  # compares the length
            return set(file.keys())
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path.name} is cut off or no safetensors file ({error})") from error


def _check_archive(path: Path) -> None:
    """Check a file by ``torch.save``, which is a zip archive with its directory at the end."""
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                if entry.compress_type != zipfile.ZIP_STORED:
                    raise ValueError(f"{entry.filename} is compressed, which torch.save never does")
                archive.open(entry).close()  # compares the entry's own header with the directory
    except FileNotFoundError as error:
        raise ValueError(f"{path.name} is missing") from error
    except _DAMAGED_ARCHIVE as error:
        raise ValueError(f"{path.name} is cut off or no file by torch.save ({error})") from error


def _argument(path: Path, name: str) -> bool | int | None:
    """The bool or int of a name in pickled ``TrainingArguments``; None if there is none.

    Raises:
        ValueError: the file holds no pickle.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            (pickled,) = [entry for entry in archive.namelist() if entry.endswith("/data.pkl")]
            operations = [(operation.name, value) for operation, value, _ in pickletools.genops(archive.read(pickled))]
    except _DAMAGED_ARCHIVE as error:
        raise ValueError(f"{path.name} is cut off or no file by torch.save ({error})") from error
    # An attribute is its name and its value; operations between only number the name for later use.
    following = iter(operations)
    for _, value in following:
        if value == name:
            operation, value = next(step for step in following if step[0] not in _NUMBERING)
            return {"NEWTRUE": True, "NEWFALSE": False}.get(operation, value if isinstance(value, int) else None)
    return None
