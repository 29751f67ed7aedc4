"""A config resolved for a model, and the plan for each module."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from ..config import ModuleSettings, OctavConfig
from ..nn import FakeQuantize, QuantizedAttention, QuantizedLayer
from .first_last import first_and_last


@dataclass(frozen=True)
class Request:
    """A config resolved for a model; keys are full names of modules."""

    model: nn.Module
    config: OctavConfig
    modules: Mapping[str, nn.Module]
    left_out: Mapping[str, str]  # modules left in float -> reason
    settings: Mapping[str, ModuleSettings]  # settings of the other modules
    edges: tuple[str, ...]  # first and last layer; empty without first_last_bits

    @classmethod
    def of(cls, model: nn.Module, config: OctavConfig) -> "Request":
        """Resolve ``config``; ``ValueError`` if overrides contradict each other or first and last layer are unclear."""
        modules = {name: module for name, module in model.named_modules() if not name.endswith("_quantizer")}
        left_out = config.left_out(modules)
        settings = config.settings_for(modules.keys() - left_out.keys())
        edges = () if config.first_last_bits is None else first_and_last(model)
        return cls(model, config, modules, left_out, settings, edges)


def prefix(name: str) -> str:
    """The beginning of a message about a module; the name of the model itself is empty."""
    return f"{name}: " if name else ""


def to_exclude(name: str) -> str:
    """What to write to leave a module in float."""
    return f"add {name!r}{'' if name else ' (the model itself, without the modules in it)'} to exclude_modules"


def to_set(name: str, field: str, value: object) -> str:
    """What to write to set a field of ``ModuleSettings`` for a module."""
    return f"module_overrides={{{name!r}: {{{field!r}: {value!r}}}}}" if name else f"{field}={value!r}"


class QuantizerPlan(NamedTuple):
    """A quantizer to create: its class and the arguments of its constructor."""

    quantizer_class: type[FakeQuantize]
    init_kwargs: Mapping[str, Any]


@dataclass(frozen=True)
class ModulePlan:
    """A module to convert, with its full name, quantized class and the quantizer of each operand (``None``: float)."""

    name: str
    module: nn.Module
    quantized_class: type[QuantizedLayer] | type[QuantizedAttention]
    quantizers: Mapping[str, QuantizerPlan | None]
    frozen_weight_clips: bool = False  # whether the checkpoint contains the clips of the weight

    def convert(self) -> None:
        """Convert the module in place."""
        made = {
            operand: nn.Identity() if plan is None else plan.quantizer_class(**plan.init_kwargs)
            for operand, plan in self.quantizers.items()
        }
        if issubclass(self.quantized_class, QuantizedAttention):
            self.quantized_class.convert(self.module, made, self.name)
        else:
            self.quantized_class.convert(self.module, made)
