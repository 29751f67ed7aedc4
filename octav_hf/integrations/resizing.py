"""Quantize a head again as soon as ``resize_token_embeddings`` has replaced it.

Importing this module replaces ``PreTrainedModel.resize_token_embeddings``. The first forward pass would quantize the
head too, but an optimizer, a calibration or a report made before it would miss the head's quantizers.
"""

import functools
from typing import Any

from transformers import PreTrainedModel

from ..conversion.output_embeddings import requantize_output_embeddings

_transformers_resize_token_embeddings = PreTrainedModel.resize_token_embeddings


@functools.wraps(_transformers_resize_token_embeddings)
def resize_token_embeddings(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    embeddings = _transformers_resize_token_embeddings(self, *args, **kwargs)
    requantize_output_embeddings(self)  # after the weights were tied again, which decides how the head is quantized
    return embeddings


PreTrainedModel.resize_token_embeddings = resize_token_embeddings  # type: ignore[method-assign]
