"""An embedding table whose rows pass through a quantizer when they are looked up."""

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor, nn

from .fake_quantize import FakeQuantize
from .granularity import Granularity
from .quantized_layer import QuantizedLayer, register_quantized_layer


@register_quantized_layer(nn.Embedding)
class QuantizedEmbedding(QuantizedLayer, nn.Embedding):
    """``nn.Embedding`` with ``weight_quantizer``; one clip per row (token).

    A row's clip depends on that row alone, so quantizing the rows that are looked up gives what looking up in the
    quantized table would, gradients included, at the price of the batch and not of the vocabulary. It is also how a
    linear head whose weight is tied to the table quantizes it: row by row. A model that reads ``weight`` itself,
    without calling the module, gets it in float.
    """

    kind = "embedding"
    operands: ClassVar[Mapping[str, str]] = {"weight": "embedding_bits"}
    clip_dim = (-1,)
    weight_quantizer_class = FakeQuantize
    weight_granularities = (Granularity.CHANNEL,)

    @classmethod
    def unsupported_reason(cls, layer: nn.Module) -> str:
        """A row that is rounded after ``max_norm`` was applied may be longer than that."""
        if layer.max_norm is None:
            return ""
        return f"its max_norm={layer.max_norm} would not hold for the quantized rows; set max_norm to None"

    def forward(self, input: Tensor) -> Tensor:
        """``Q(weight)[input]``, ``[*, embedding_dim]``; the row of ``padding_idx`` gets no gradient."""
        return self.weight_quantizer(super().forward(input))
