"""Quantized convolutions."""

from collections.abc import Callable

from torch import Tensor, nn

from .quantized_layer import QuantizedLayer, register_quantized_layer
from .shared_inputs import quantize_input


class QuantizedConvolution(QuantizedLayer):
    """Base class, with one weight clip per output channel (Appendix E.2: row of the K × CRS matrix).

    Quantizing the input before padding is exact: zero is on every grid, and other padding modes repeat values.
    """

    kind = "convolution"
    bias: Tensor | None
    _conv_forward: Callable[[Tensor, Tensor, Tensor | None], Tensor]  # of the float class

    def forward(self, input: Tensor) -> Tensor:
        """``Q(weight) * Q(input) + bias``; same shapes as for the float layer."""
        return self._conv_forward(
            quantize_input(self.input_quantizer, input), self.weight_quantizer(self.weight), self.bias
        )


@register_quantized_layer(nn.Conv1d)
class QuantizedConv1d(QuantizedConvolution, nn.Conv1d):
    """``nn.Conv1d`` with ``weight_quantizer`` and ``input_quantizer``."""

    clip_dim = (1, 2)


@register_quantized_layer(nn.Conv2d)
class QuantizedConv2d(QuantizedConvolution, nn.Conv2d):
    """``nn.Conv2d`` with ``weight_quantizer`` and ``input_quantizer``."""

    clip_dim = (1, 2, 3)
