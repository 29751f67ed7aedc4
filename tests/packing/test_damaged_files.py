"""Packed files damaged in 370 ways: each error names the file and the damage."""

import hashlib
import json
import random
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForQuestionAnswering, BertForQuestionAnswering

from octav_hf import OctavConfig, apply_octav, pack_octav
from tests.bomb import Bomb

MakeBert = Callable[..., BertForQuestionAnswering]

FILE = "model.safetensors"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an undamaged packed model."""
    from transformers import BertConfig

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = BertForQuestionAnswering(BertConfig(vocab_size=40, max_position_embeddings=16, **sizes))
    folder = tmp_path_factory.mktemp("whole")
    pack_octav(apply_octav(model, OctavConfig())).save_pretrained(folder)
    assert AutoModelForQuestionAnswering.from_pretrained(folder)
    return folder


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def read(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    with safe_open(folder / FILE, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata())  # noqa: SIM118


def error_of(folder: Path) -> str:
    """The error of loading the model; success is a failure."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # the caller matches the message
        AutoModelForQuestionAnswering.from_pretrained(folder)
    message = str(caught.value)
    assert str(folder / FILE) in message
    return message


@pytest.mark.parametrize("seed", range(100))
def test_cut_off(copy: Path, seed: int) -> None:
    content = (copy / FILE).read_bytes()
    (copy / FILE).write_bytes(content[: random.Random(seed).randrange(len(content))])
    assert "truncated or altered" in error_of(copy)


@pytest.mark.parametrize("seed", range(150))
def test_a_flipped_bit(copy: Path, seed: int) -> None:
    content = bytearray((copy / FILE).read_bytes())
    (header_length,) = struct.unpack("<Q", content[:8])
    header_end = 8 + header_length
    # A third each: in the header, in the values, anywhere.
    first, last = [(0, header_end), (header_end, len(content)), (0, len(content))][seed % 3]
    place = random.Random(seed).randrange(first, last)
    content[place] ^= 1 << (seed % 8)
    (copy / FILE).write_bytes(content)
    message = error_of(copy)
    if place >= header_end:
        header = json.loads(content[8:header_end])
        offset = place - header_end
        entries = {name: entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"}
        (damaged,) = [name for name, (begin, end) in entries.items() if begin <= offset < end]
        assert f"the values of {damaged} are altered" in message


def renamed(tensors: dict[str, torch.Tensor], chance: random.Random) -> str:
    name = chance.choice(sorted(tensors))
    tensors[f"{name}_"] = tensors.pop(name)
    return name


def swapped(tensors: dict[str, torch.Tensor], chance: random.Random) -> str:
    """Exchange two tensors that differ and look alike."""
    pairs = [
        (a, b)
        for a in tensors
        for b in tensors
        if a < b
        and tensors[a].shape == tensors[b].shape
        and tensors[a].dtype == tensors[b].dtype
        and not torch.equal(tensors[a], tensors[b])
    ]
    a, b = chance.choice(sorted(pairs))
    tensors[a], tensors[b] = tensors[b], tensors[a]
    return a


def reshaped(tensors: dict[str, torch.Tensor], chance: random.Random) -> str:
    name = chance.choice(sorted(tensors))
    tensors[name] = tensors[name].reshape(1, -1)
    return name


def shortened(tensors: dict[str, torch.Tensor], chance: random.Random) -> str:
    name = chance.choice(sorted(tensors))
    tensors[name] = tensors[name][:-1].contiguous()
    return name


def retyped(tensors: dict[str, torch.Tensor], chance: random.Random) -> str:
    """Another dtype of the same size, with the same bytes."""
    name = chance.choice(sorted(tensors))
    other = {torch.uint8: torch.int8, torch.float32: torch.int32}
    tensors[name] = tensors[name].view(other[tensors[name].dtype])
    return name


def removed(tensors: dict[str, torch.Tensor], chance: random.Random) -> str:
    name = chance.choice(sorted(tensors))
    del tensors[name]
    return name


def changed(tensors: dict[str, torch.Tensor], chance: random.Random) -> str:
    """Another value at one place."""
    name = chance.choice(sorted(tensors))
    tensors[name] = tensors[name].clone()
    flat = tensors[name].view(-1)
    flat[chance.randrange(len(flat))] += 1
    return name


def added(tensors: dict[str, torch.Tensor], chance: random.Random) -> str:
    name = f"extra.{chance.choice(sorted(tensors))}"
    tensors[name] = torch.zeros(3)
    return name


SAYS = {
    renamed: "is not in its record",
    swapped: "are altered",
    reshaped: "has shape [1, ",
    shortened: "has shape [",
    retyped: "has dtype int",
    removed: "is missing (1 in all)",
    changed: "are altered",
    added: "is not in its record",
}


@pytest.mark.parametrize("seed", range(15))
@pytest.mark.parametrize("damage", SAYS)
def test_a_tensor_that_is_not_what_was_saved(
    copy: Path, damage: Callable[[dict[str, torch.Tensor], random.Random], str], seed: int
) -> None:
    tensors, metadata = read(copy)
    name = damage(tensors, random.Random(seed))
    save_file(tensors, copy / FILE, metadata=metadata)
    message = error_of(copy)
    assert re.search(rf"\b{re.escape(name)}", message)
    assert SAYS[damage] in message


def test_records_that_are_not_what_was_saved(whole: Path, copy: Path) -> None:
    tensors, metadata = read(whole)
    record = json.loads(metadata["octav_hf"])
    other_bits = record | {"quantization_config": record["quantization_config"] | {"weight_bits": 3}}
    damaged: dict[str, dict[str, Any]] = {
        "has the keys": {},
        "not ['format', 'octav_hf', 'octav_hf_sha256']": {"format": "pt", "octav_hf": metadata["octav_hf"]},
        "format='tf'": metadata | {"format": "tf"},
        "the record of its tensors in the metadata is altered": metadata | {"octav_hf": json.dumps(other_bits)},
    }
    for message, changed_metadata in damaged.items():
        save_file(tensors, copy / FILE, metadata=changed_metadata)
        assert message in error_of(copy)


def test_further_metadata_is_ignored(copy: Path) -> None:
    tensors, metadata = read(copy)
    save_file(tensors, copy / FILE, metadata=metadata | {"more": "of a later Transformers"})
    assert AutoModelForQuestionAnswering.from_pretrained(copy).qa_outputs.weight.shape == (2, 16)


@pytest.mark.parametrize(
    "record",
    ["3", "[]", "{}", '{"quantization_config": {}, "tensors": {"a": {"b": 1}}}', "[" * 10**5],
    ids=lambda record: record[:9],
)
def test_a_record_of_another_form_with_its_hash(copy: Path, record: str) -> None:
    tensors, metadata = read(copy)
    digest = hashlib.sha256(record.encode()).hexdigest()
    save_file(tensors, copy / FILE, metadata=metadata | {"octav_hf": record, "octav_hf_sha256": digest})
    assert "the record of its tensors in the metadata is invalid" in error_of(copy)


def test_names_of_tensors_are_no_commands_to_a_terminal(copy: Path) -> None:
    tensors, metadata = read(copy)
    save_file(tensors | {"\x1b[2J": torch.zeros(1)}, copy / FILE, metadata=metadata)
    assert r"the tensor \x1b[2J is not in its record" in error_of(copy)


def test_files_of_two_models(whole: Path, tmp_path: Path) -> None:
    for name, bits in (("first", 4), ("second", 4)):
        model = AutoModelForQuestionAnswering.from_pretrained(whole).dequantize()
        with torch.no_grad():
            model.qa_outputs.bias.fill_(0.0 if name == "first" else 1.0)
        pack_octav(apply_octav(model, OctavConfig(weight_bits=bits))).save_pretrained(
            tmp_path / name, max_shard_size="2KB"
        )
    files = sorted((tmp_path / "first").glob("*.safetensors"))
    assert len(files) > 2
    shutil.copy(tmp_path / "second" / files[1].name, files[1])
    with pytest.raises(ValueError, match=rf"{re.escape(str(files[1]))}: its record differs from that of"):
        AutoModelForQuestionAnswering.from_pretrained(tmp_path / "first")


def test_a_tensor_in_two_shards(whole: Path, tmp_path: Path) -> None:
    AutoModelForQuestionAnswering.from_pretrained(whole).save_pretrained(tmp_path, max_shard_size="2KB")
    first, second, *_ = sorted(tmp_path.glob("*.safetensors"))
    (name, tensor), *_ = load_file(first).items()
    with safe_open(second, framework="pt") as file:
        metadata = file.metadata()
    save_file(load_file(second) | {name: tensor}, second, metadata=metadata)
    with pytest.raises(ValueError, match=rf"{re.escape(str(second))}: {re.escape(name)} is also in .*{first.name}"):
        AutoModelForQuestionAnswering.from_pretrained(tmp_path)


def test_a_missing_shard(whole: Path, tmp_path: Path) -> None:
    AutoModelForQuestionAnswering.from_pretrained(whole).save_pretrained(tmp_path, max_shard_size="2KB")
    first, *_ = sorted(tmp_path.glob("*.safetensors"))
    first.unlink()
    with pytest.raises(OSError, match=re.escape(first.name)):
        AutoModelForQuestionAnswering.from_pretrained(tmp_path)


def test_nothing_is_unpickled(copy: Path, tmp_path: Path) -> None:
    (copy / FILE).unlink()
    torch.save({"bert.x": Bomb(tmp_path / "trace")}, copy / "pytorch_model.bin")
    for options in ({}, {"use_safetensors": False}, {"weights_only": False}):
        with pytest.raises((ValueError, OSError), match=r"pytorch_model\.bin"):
            AutoModelForQuestionAnswering.from_pretrained(copy, **options)
    assert not (tmp_path / "trace").exists()
    with pytest.raises(Exception, match="torch"):  # and the bomb would have left it
        torch.load(copy / "pytorch_model.bin", weights_only=True)
    torch.load(copy / "pytorch_model.bin", weights_only=False)
    assert (tmp_path / "trace").exists()
