"""What is to happen to one module: its quantized class, and the settings of each operand's quantizer."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from ..nn import FakeQuantize, QuantizedAttention, QuantizedLayer


class QuantizerPlan(NamedTuple):
    """A quantizer that is to be made: its class, and the arguments of the constructor."""

    quantizer_class: type[FakeQuantize]
    init_kwargs: Mapping[str, Any]


@dataclass(frozen=True)
class ModulePlan:
    """One module to convert.

    Args:
        name: the module's full name in the model.
        module: the module.
        quantized_class: what it becomes.
        quantizers: operand -> the quantizer it gets; ``None`` leaves the operand in float.
    """

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
