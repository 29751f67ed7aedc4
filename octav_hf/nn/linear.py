"""A quantized linear layer."""

import torch
from torch import Tensor, nn

from .granularity import ACTIVATION_GRANULARITIES
from .quantized_layer import QuantizedLayer, register_quantized_layer
from .shared_inputs import quantize_input

# PyTorch's nn.functional.linear. DeepSpeed's ZeRO-3 replaces it by a function whose matmuls would be taken for
# attention's.
LINEAR = torch._C._nn.linear


@register_quantized_layer(nn.Linear)
class QuantizedLinear(QuantizedLayer, nn.Linear):
    """``nn.Linear`` with ``weight_quantizer`` and ``input_quantizer``; one weight clip per output feature (row)."""

    kind = "linear"
    clip_dim = (1,)
    input_granularities = ACTIVATION_GRANULARITIES["input"]
    supports_asymmetric_input = True

    def forward(self, input: Tensor) -> Tensor:
        """``Q(input) Q(weight)^T + bias``; shapes as for ``nn.Linear``."""
        return LINEAR(quantize_input(self.input_quantizer, input), self.weight_quantizer(self.weight), self.bias)
