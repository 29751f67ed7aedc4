"""Steps that call the package."""

from __future__ import annotations

from random import Random
from typing import Any

from octav_hf import (
    OctavConfig,
    apply_octav,
    calibrate_octav,
    calibrating,
    pack_octav,
    remove_octav,
    uncalibrate_octav,
    unpack_octav,
)
from octav_hf.nn import QuantizedEmbedding

from .check import Broken, outputs, same_outputs
from .models import Kind
from .subject import Arguments, Subject, action


def _draw_config(random: Random, kind: Kind) -> Arguments:
    """Some fields of an ``OctavConfig`` with values other than the defaults."""
    bits = [2, 3, 4, 5, 6, 8, None]
    rules = ["octav", "mse", "max"]
    layer = random.choice([*kind.layers, f"*{kind.head}"])
    granularity = random.choice(
        [{"input": "token"}, {"value": "channel"}, {"query": "attn_head", "key": "token", "probabilities": "attn_head"}]
    )
    override = random.choice(
        [
            {"weight_bits": random.choice(bits)},
            {"activation_bits": random.choice(bits)},
            {"weight_clip": "max", "activation_clip": "mse"},
            {"quantize_attention": False},
            {"weight_granularity": "tensor"},
        ]
    )
    possible = {
        "weight_bits": random.choice(bits),
        "activation_bits": random.choice(bits),
        "embedding_bits": random.choice([8, 4]),
        "weight_clip": random.choice(rules),
        "activation_clip": random.choice(rules),
        "weight_granularity": "tensor",
        "activation_granularity": granularity,
        "weight_gradient_estimator": "ste",
        "unsigned_activations": False,
        "asymmetric_activations": True,
        "quantize_attention": False,
        "exclude_modules": [layer],
        "target_modules": [layer],
        "module_overrides": {layer: override},
    }
    count = random.choice([0, 1, 1, 2, 3])
    return {name: possible[name] for name in sorted(random.sample(sorted(possible), count))}


@action(14, _draw_config, on=["model"] * 5 + ["outer", "outer", "base", "part", "head"])
def apply(subject: Subject, on: str = "model", **fields: Any) -> None:
    """``apply_octav``, on the model, on what is around it or on a part of it."""
    config = OctavConfig(**fields)
    apply_octav(subject.named(on), config)
    subject.config = config


@action(6, on=["model", "model", "outer", "base"], activations=[True, True, False], weights=[False, True])
def calibrate(subject: Subject, on: str = "model", activations: bool = True, weights: bool = False) -> None:
    """``calibrate_octav``, of activations, weights or both."""
    batches = [subject.kind.batch(seed) for seed in (1, 2)]
    calibrate_octav(subject.named(on), batches if activations else None, weights=weights, progress_bar=False)


@action(1)
def calibrate_base(subject: Subject) -> None:
    """Calibrate with a loop that does not reach the head."""
    with calibrating(subject.model):
        outputs(subject.kind.base(subject.model), base_batch(subject))


@action(2, on=["model", "model", "outer"], activations=[True, True, False], weights=[True, False])
def uncalibrate(subject: Subject, on: str = "model", activations: bool = True, weights: bool = True) -> None:
    """``uncalibrate_octav``."""
    uncalibrate_octav(subject.named(on), activations=activations, weights=weights)


@action(6, on=["model", "model", "outer", "base"], embedding_bits=[None, None, 8, 4])
def pack(subject: Subject, on: str = "model", embedding_bits: int | None = None) -> None:
    """``pack_octav``."""
    table = getattr(getattr(subject.model.base_model, "encoder", None), "rel_embeddings", None)
    if isinstance(table, QuantizedEmbedding):
        raise ValueError("DeBERTa reads this table by its weight, so that packing changes the outputs")
    pack_octav(subject.named(on), embedding_bits=embedding_bits)
    before = subject.earlier[-1].outputs
    if embedding_bits is None and not same_outputs(before, outputs(subject.model, subject.batch)):
        raise Broken("pack_octav changed the outputs")


@action(3, on=["model", "model", "outer"])
def unpack(subject: Subject, on: str = "model") -> None:
    """``unpack_octav``."""
    unpack_octav(subject.named(on))


@action(1, on=["model", "outer", "base"])
def remove(subject: Subject, on: str = "model") -> None:
    """``remove_octav``."""
    remove_octav(subject.named(on))


def base_batch(subject: Subject) -> Arguments:
    return {name: value for name, value in subject.batch.items() if not name.startswith("decoder_")}
