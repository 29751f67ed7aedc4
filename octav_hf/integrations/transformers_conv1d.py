"""Transformers' ``Conv1D``, the linear layer of GPT-2, which stores its weight transposed."""

from torch import Tensor
from transformers.pytorch_utils import Conv1D

from .._utils.torch_private import LINEAR
from ..nn import QuantizedLayer, register_quantized_layer
from ..nn.granularity import ACTIVATION_GRANULARITIES, WEIGHT_GRANULARITIES
from ..nn.shared_inputs import quantize_input


@register_quantized_layer(Conv1D)
class QuantizedTransformersConv1D(QuantizedLayer, Conv1D):
    """``Conv1D`` with ``weight_quantizer`` and ``input_quantizer``; one weight clip per output feature (column)."""

    kind = "linear"
    clip_dim = (0,)
    weight_granularities = WEIGHT_GRANULARITIES
    input_granularities = ACTIVATION_GRANULARITIES["input"]
    supports_asymmetric_input = True

    def forward(self, x: Tensor) -> Tensor:
        """``Q(x) Q(weight) + bias``; ``x`` is ``[..., in]``, the weight ``[in, out]``, the result ``[..., out]``."""
        return LINEAR(quantize_input(self.input_quantizer, x), self.weight_quantizer(self.weight).t(), self.bias)
