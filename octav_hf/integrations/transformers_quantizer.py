"""The Transformers quantizer: ``from_pretrained`` rebuilds a quantized model, Trainer accepts it, saving keeps it."""

from typing import Any

from transformers import PreTrainedModel
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.base import HfQuantizer

from ..config import QUANT_METHOD, OctavConfig
from ..patching import convert_modules, restore_modules


@register_quantizer(QUANT_METHOD)
class OctavQuantizer(HfQuantizer):
    """Converts a model's modules before its weights are loaded.

    Checkpoints hold the full-precision weights under their usual names, and the ``OctavConfig`` in ``config.json``:
    clips are recomputed from the data, or frozen in the config, so there is nothing else to store.
    """

    requires_calibration = False
    quantization_config: OctavConfig

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        convert_modules(model, self.quantization_config)
        return model

    def _dequantize(self, model: PreTrainedModel, dtype: Any = None) -> PreTrainedModel:
        restore_modules(model)
        return model

    def is_serializable(self) -> bool:
        """Always: the state dict is the float model's."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Always."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Always: all weights are trained, in full precision."""
        return True
