"""A quantized linear layer."""

from torch import Tensor, nn

from .._utils.torch_private import LINEAR
from .granularity import ACTIVATION_GRANULARITIES, WEIGHT_GRANULARITIES
from .quantized_layer import QuantizedLayer, register_quantized_layer
from .shared_inputs import quantize_input


@register_quantized_layer(nn.Linear)
class QuantizedLinear(QuantizedLayer, nn.Linear):
    """``nn.Linear`` with ``weight_quantizer`` and ``input_quantizer``; one weight clip per output feature (row)."""

    kind = "linear"
    clip_dim = (1,)
    weight_granularities = WEIGHT_GRANULARITIES
    input_granularities = ACTIVATION_GRANULARITIES["input"]
    supports_asymmetric_input = True

    def forward(self, input: Tensor) -> Tensor:
        """``Q(input) Q(weight)^T + bias``; same shapes as for ``nn.Linear``."""
        return LINEAR(quantize_input(self.input_quantizer, input), self.weight_quantizer(self.weight), self.bias)
