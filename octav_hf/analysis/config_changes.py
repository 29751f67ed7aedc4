"""Changes of a config that may bring a model closer to the float model, and what they cost."""

import glob
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from torch import nn

from ..config import WRITTEN_FIELDS, OctavConfig
from ..conversion.modules import operand_quantizers
from ..nn import QuantizedLayer
from ..nn.granularity import FINEST
from .sensitivity import ModuleSensitivity

_MORE_BITS = 8
_WORST_SHARE = 0.5  # the modules that get more bits have this share of the sum of the sensitivities

_SCALE_BITS = 32
_BIT_FIELDS = ("weight_bits", "activation_bits")  # written even where they are the default

# What changes require of the hardware.
_SAME = "the same integer products"
_SCALES = "a scale for each token and channel"
_GROUPS = "products of groups"
_BITS = "more bits"

# Costs in words and as a number: a share of a training step, or an estimate (groups). Times are from benchmarks/step.py
# for MiniLM on a CPU: a step with the preset takes 1.04 times as long as with the paper's recipe.
_OF_OFFSETS = "one more number for each output feature, which is added as the bias is", 0.01
_OF_MSE = "nothing in inference with static clips; a training step takes up to 1.04 times as long", 0.04
_OF_SCALES = (
    "the same integer products, with a scale for each row and column of the result as in kernels with dynamic "
    "quantization per token; frozen clips are one per tensor nevertheless",
    0.02,
)
_OF_ACCURATE = f"{_OF_SCALES[0]}; a training step takes 1.04 times as long", 0.06
_OF_GROUPS = "an integer product for each group, which convert_octav and the ONNX export do not have", 0.25


@dataclass(frozen=True)
class Change:
    """A config, and what is different in it.

    Attributes:
        title: in words.
        config: the whole one.
        asks: what it requires of the hardware; of changes that require the same, only one is suggested.
        cost: in words and measured numbers, without the bytes of the weights.
        price: the cost as a number.
    """

    title: str
    config: OctavConfig
    asks: str
    cost: str
    price: float


def changes(model: nn.Module, config: OctavConfig, sensitivities: Sequence[ModuleSensitivity]) -> Iterator[Change]:
    """Changes of ``config``, the config of ``model``, except those that it already contains."""
    activation_mse, weight_mse = (
        {f"{side}_clip": "mse", f"{side}_clip_options": {}} for side in ("activation", "weight")
    )
    mse = activation_mse | weight_mse
    asymmetric = {"asymmetric_activations": True, "unsigned_activations": True}
    finest = {"activation_granularity": FINEST}
    groups = {name: getattr(OctavConfig.groups(), name) for name in ("weight_granularity", "activation_granularity")}
    listed: list[tuple[str, dict[str, Any], str, tuple[str, float]]] = [
        ("Asymmetric grids, for inputs such as the output of a GELU", asymmetric, _SAME, _OF_OFFSETS),
        ('Clips "mse" of activations', activation_mse, _SAME, _OF_MSE),
        ('Clips "mse" of weights', weight_mse, _SAME, _OF_MSE),
        ('Clips "mse" and asymmetric grids', mse | asymmetric, _SAME, _OF_MSE),
        *(
            (
                f"A clip per {part} of the operand {operand}",
                {"activation_granularity": {operand: part}},
                _SCALES,
                _OF_SCALES,
            )
            for operand, part in FINEST.items()
        ),
        ("A clip per token, and per channel of values", finest, _SCALES, _OF_SCALES),
        ('Clips "mse" per token and channel, and asymmetric grids', finest | mse | asymmetric, _SCALES, _OF_ACCURATE),
        ("Groups in weights", {"weight_granularity": "group"}, _GROUPS, _OF_GROUPS),
        ('Clips "mse" in groups, and asymmetric grids', groups | mse | asymmetric, _GROUPS, _OF_GROUPS),
    ]
    for title, values, asks, (cost, price) in listed:
        granularity = config.activation_granularity | values.get("activation_granularity", {})
        changed = replace(config, **values | {"activation_granularity": granularity})
        if changed != config:
            yield Change(title, changed, asks, cost, price)
    yield from _more_bits(model, config, sensitivities)


def _more_bits(model: nn.Module, config: OctavConfig, sensitivities: Sequence[ModuleSensitivity]) -> Iterator[Change]:
    """8 bits for the most sensitive of the modules that have fewer, and for the modules inside them."""
    operands = [(name, _bits_field(model, name, operand), each) for name, operand, each in operand_quantizers(model)]
    names = {name for name, _, _ in operands}
    narrow = {name for name, _, quantizer in operands if quantizer.num_bits < _MORE_BITS}
    ranked = sorted((each for each in sensitivities if each.module in narrow), key=lambda each: -each.alone)
    rest = _WORST_SHARE * sum(each.alone for each in ranked)
    worst, wider = 0, set[str]()
    for each in ranked:
        inside = {name for name in names if name == each.module or name.startswith(f"{each.module}.")}
        bits = {field: _MORE_BITS for name, field, _ in operands if name in inside}  # what is in float stays so
        pattern = glob.escape(each.module)
        own = config.module_overrides.get(pattern, {})
        changed = replace(config, module_overrides=config.module_overrides | {pattern: own | bits})
        if rest > 0 and _is_consistent(changed, inside):
            config, rest, worst, wider = changed, rest - each.alone, worst + 1, wider | inside
    if worst:
        several = f"{worst} most sensitive modules and what is in them"
        yield Change(
            f"{_MORE_BITS} bits for the {'most sensitive module and what is in it' if worst == 1 else several}",
            config,
            _BITS,
            f"{len(wider)} of {len(names)} modules get {_MORE_BITS} bits",
            len(wider) / len(names),
        )


def _bits_field(model: nn.Module, name: str, operand: str) -> str:
    """The field of ``ModuleSettings`` with the bits of an operand."""
    module = model.get_submodule(name)
    return module.operands[operand] if isinstance(module, QuantizedLayer) else "activation_bits"


def _is_consistent(config: OctavConfig, names: Iterable[str]) -> bool:
    """Whether no pattern with wildcards sets for modules inside another one what the override of that one sets."""
    try:
        config.settings_for(names)
    except ValueError:
        return False
    return True


def packed_bits(model: nn.Module) -> int:
    """Bits of the quantized weights when packed: integers, and a float32 scale for each clip."""
    total = 0
    for module, operand, quantizer in operand_quantizers(model):
        if operand == "weight":
            weight: Any = model.get_submodule(module).weight
            clips = quantizer.compute_clip(weight.detach()).numel()
            total += weight.numel() * quantizer.num_bits + _SCALE_BITS * clips
    return total


def written(config: OctavConfig) -> str:
    """Python that makes this config, from the preset that differs in the fewest fields."""
    presets = {"": OctavConfig(), ".accurate": OctavConfig.accurate(), ".groups": OctavConfig.groups()}
    values = config.to_dict()

    def different(preset: OctavConfig) -> dict[str, Any]:
        given = preset.to_dict()
        names = [each.name for each in fields(config) if each.init and each.name not in WRITTEN_FIELDS]
        return {name: values[name] for name in names if name in _BIT_FIELDS or values[name] != given[name]}

    name = min(presets, key=lambda name: len(different(presets[name])))
    lines = "".join(f"    {field}={value!r},\n" for field, value in different(presets[name]).items())
    return (
        "from octav_hf import OctavConfig, apply_octav\n\n"
        f"config = OctavConfig{name}(\n{lines})\n"
        "apply_octav(model, config)  # the float model, before it is trained\n"
    )
