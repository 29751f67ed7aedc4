"""A quantized embedding."""

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor, nn

from .fake_quantize import FakeQuantize
from .granularity import Granularity
from .quantized_layer import QuantizedLayer, register_quantized_layer


@register_quantized_layer(nn.Embedding)
class QuantizedEmbedding(QuantizedLayer, nn.Embedding):
    """``nn.Embedding`` with ``weight_quantizer``; one clip per row (token).

    Only the rows that are looked up are quantized, with the same result and gradients as quantizing the whole table. A
    linear head with a tied weight also quantizes it per row. A model that reads ``weight`` directly gets it in float.
    """

    kind = "embedding"
    operands: ClassVar[Mapping[str, str]] = {"weight": "embedding_bits"}
    clip_dim = (-1,)
    weight_quantizer_class = FakeQuantize
    weight_granularities = (Granularity.CHANNEL,)

    @classmethod
    def unsupported_reason(cls, layer: nn.Module) -> str:
        """As in ``QuantizedLayer``; ``max_norm`` is not supported, because rounding may increase the norm of a row."""
        if layer.max_norm is None:
            return ""
        return f"its max_norm={layer.max_norm} would not hold for the quantized rows; set max_norm to None"

    def forward(self, input: Tensor) -> Tensor:
        """``Q(weight)[input]``, ``[*, embedding_dim]``; the row of ``padding_idx`` gets no gradient."""
        return self.weight_quantizer(super().forward(input))
