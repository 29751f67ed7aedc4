"""Convolutions whose weight and input pass through quantizers."""

from collections.abc import Callable

from torch import Tensor, nn

from .quantized_layer import QuantizedLayer, register_quantized_layer
from .shared_inputs import quantize_input


class QuantizedConvolution(QuantizedLayer):
    """What the convolutions have in common, grouped, dilated, strided and padded alike.

    One weight clip per output channel (Appendix E.2: the row of the K × CRS matrix). The input is quantized before it
    is padded: padding with zeros adds a value that is on every grid, and the other modes repeat quantized values.
    """

    kind = "convolution"
    bias: Tensor | None
    _conv_forward: Callable[[Tensor, Tensor, Tensor | None], Tensor]  # of the float class

    def forward(self, input: Tensor) -> Tensor:
        """``Q(weight) * Q(input) + bias``; shapes as for the float layer."""
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
