"""The quantizer module, and layers and attention modules with quantized operands. Depends only on torch."""

from .attention.matmuls import AttentionMatmuls
from .attention.module import QuantizedAttention
from .attention.scaled_dot_product_attention import quantized_scaled_dot_product_attention
from .clip_observer import ClipObserver
from .convolution import QuantizedConv1d, QuantizedConv2d, QuantizedConvolution
from .embedding import QuantizedEmbedding
from .fake_quantize import FROZEN_BUFFERS, FROZEN_TENSORS, FakeQuantize
from .frozen_clips import FrozenClips
from .granularity import ATTENTION_OPERANDS
from .histogram_observer import HistogramObserver
from .holds_frozen_clips import HoldsFrozenClips
from .linear import QuantizedLinear
from .mean_observer import MeanObserver
from .packed_layer import PackedLayer
from .packed_weight import PackedWeight
from .quantized_layer import QUANTIZED_LAYERS, QuantizedLayer, quantized_class_of, register_quantized_layer
from .synchronized_fake_quantize import SynchronizedFakeQuantize
from .weight_fake_quantize import WeightFakeQuantize

__all__ = [
    "ATTENTION_OPERANDS",
    "FROZEN_BUFFERS",
    "FROZEN_TENSORS",
    "QUANTIZED_LAYERS",
    "AttentionMatmuls",
    "ClipObserver",
    "FakeQuantize",
    "FrozenClips",
    "HistogramObserver",
    "HoldsFrozenClips",
    "MeanObserver",
    "PackedLayer",
    "PackedWeight",
    "QuantizedAttention",
    "QuantizedConv1d",
    "QuantizedConv2d",
    "QuantizedConvolution",
    "QuantizedEmbedding",
    "QuantizedLayer",
    "QuantizedLinear",
    "SynchronizedFakeQuantize",
    "WeightFakeQuantize",
    "quantized_class_of",
    "quantized_scaled_dot_product_attention",
    "register_quantized_layer",
]
