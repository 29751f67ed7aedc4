"""What is asked of a model, resolved once, and the plan for each module that follows from it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from ..config import ModuleSettings, OctavConfig
from ..nn import FakeQuantize, QuantizedAttention, QuantizedLayer


@dataclass(frozen=True)
class Request:
    """A config resolved for a model, by name: its modules, those left in float with the reason, others' settings."""

    model: nn.Module
    config: OctavConfig
    modules: Mapping[str, nn.Module]
    settings: Mapping[str, ModuleSettings]
    left_out: Mapping[str, str]

    @classmethod
    def of(cls, model: nn.Module, config: OctavConfig) -> "Request":
        """Resolve ``config``. Raises ``ValueError`` for overrides that contradict each other."""
        modules = dict(model.named_modules())
        left_out = config.left_out(modules)
        return cls(model, config, modules, config.settings_for(modules.keys() - left_out.keys()), left_out)


class QuantizerPlan(NamedTuple):
    """A quantizer to make: its class, and the arguments of the constructor."""

    quantizer_class: type[FakeQuantize]
    init_kwargs: Mapping[str, Any]


@dataclass(frozen=True)
class ModulePlan:
    """A module to convert, by its full name: what it becomes, and the quantizer of each operand (``None``: float)."""

    name: str
    module: nn.Module
    quantized_class: type[QuantizedLayer] | type[QuantizedAttention]
    quantizers: Mapping[str, QuantizerPlan | None]

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
