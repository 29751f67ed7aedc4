"""A linear layer whose weight and input pass through quantizers."""

from torch import Tensor, nn

from .shared_inputs import quantize_input


class QuantizedLinear(nn.Linear):
    """``nn.Linear`` with ``weight_quantizer`` and ``input_quantizer``; ``nn.Identity`` leaves that operand in float.

    Made from an existing layer by ``convert``, which changes that object's class in place: parameters, their names,
    hooks and every reference to the module stay as they were.
    """

    weight_quantizer: nn.Module
    input_quantizer: nn.Module

    @staticmethod
    def convert(linear: nn.Linear, weight_quantizer: nn.Module, input_quantizer: nn.Module) -> None:
        """Turn ``linear``, exactly an ``nn.Linear``, into a ``QuantizedLinear`` in place."""
        linear.__class__ = QuantizedLinear
        linear.weight_quantizer = weight_quantizer
        linear.input_quantizer = input_quantizer

    def restore(self) -> None:
        """Turn this layer back into the ``nn.Linear`` it was, in place."""
        del self.weight_quantizer, self.input_quantizer
        self.__class__ = nn.Linear  # type: ignore[assignment]

    def forward(self, input: Tensor) -> Tensor:
        """``Q(input) Q(weight)^T + bias``; shapes as for ``nn.Linear``."""
        return nn.functional.linear(
            quantize_input(self.input_quantizer, input), self.weight_quantizer(self.weight), self.bias
        )
