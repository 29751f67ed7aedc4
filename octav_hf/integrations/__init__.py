"""Hooks into other libraries, registered on import."""

from .feature_steps import FeatureSteps
from .resizing import resize_token_embeddings
from .saving import save_pretrained
from .trainer_callback import OctavCallback
from .transformers_conv1d import QuantizedTransformersConv1D
from .transformers_quantizer import OctavQuantizer

__all__ = [
    "FeatureSteps",
    "OctavCallback",
    "OctavQuantizer",
    "QuantizedTransformersConv1D",
    "resize_token_embeddings",
    "save_pretrained",
]
