"""Convolutions whose weight and input pass through quantizers."""

from torch import Tensor, nn

from .quantized_layer import QuantizedLayer, register_quantized_layer
from .shared_inputs import quantize_input


@register_quantized_layer(nn.Conv1d)
class QuantizedConv1d(QuantizedLayer, nn.Conv1d):
    """``nn.Conv1d`` with ``weight_quantizer`` and ``input_quantizer``, grouped, dilated, strided and padded alike.

    One weight clip per output channel (Appendix E.2: the row of the K × CRS matrix). The input is quantized before it
    is padded: padding with zeros adds a value that is on every grid, and the other modes repeat quantized values.
    """

    kind = "convolution"
    clip_dim = (1, 2)

    def forward(self, input: Tensor) -> Tensor:
        """``Q(weight) * Q(input) + bias``; shapes as for ``nn.Conv1d``."""
        return self._conv_forward(
            quantize_input(self.input_quantizer, input), self.weight_quantizer(self.weight), self.bias
        )


@register_quantized_layer(nn.Conv2d)
class QuantizedConv2d(QuantizedLayer, nn.Conv2d):
    """``nn.Conv2d`` with quantizers, as ``QuantizedConv1d``."""

    kind = "convolution"
    clip_dim = (1, 2, 3)

    def forward(self, input: Tensor) -> Tensor:
        """``Q(weight) * Q(input) + bias``; shapes as for ``nn.Conv2d``."""
        return self._conv_forward(
            quantize_input(self.input_quantizer, input), self.weight_quantizer(self.weight), self.bias
        )
