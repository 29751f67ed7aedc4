"""Make ``save_pretrained`` write a config that describes the modules of the saved model.

Importing this module replaces ``PreTrainedModel.save_pretrained``. Transformers asks only the quantizer of the saved
model. A model around or inside the one that was quantized has no quantizer, and a float model created from the config
of a quantized model would be saved as quantized.
"""

import copy
import functools
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from .._utils.sharded_weights import sharded_shape
from .._utils.transformers_compat import has_adapters
from ..config import QUANT_METHOD, OctavConfig
from ..conversion.modules import is_quantized
from ..conversion.output_embeddings import requantize_output_embeddings
from ..conversion.record import recorded_config
from ..conversion.verify import check_comes_back
from ..training.finite_clips import check_finite
from .transformers_quantizer import OctavQuantizer

_transformers_save_pretrained = PreTrainedModel.save_pretrained
_SIGNATURE = inspect.signature(_transformers_save_pretrained)


@functools.wraps(_transformers_save_pretrained)
def save_pretrained(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    given = _SIGNATURE.bind(self, *args, **kwargs).arguments
    with _as_recorded(self, given.get("state_dict"), given.get("save_original_format", True)):
        return _transformers_save_pretrained(self, *args, **kwargs)


PreTrainedModel.save_pretrained = save_pretrained  # type: ignore[method-assign]


@contextmanager
def _as_recorded(
    model: PreTrainedModel, state_dict: Mapping[str, Tensor] | None, in_original_format: bool
) -> Iterator[None]:
    """Context in which the model has the quantizer and the ``quantization_config`` to save.

    The model gets a copy of its config, because other models may share the config and be saved at the same time.

    Raises:
        ValueError: loading would not restore the model, or a tensor in its last forward passes held NaN or Inf.
        NotImplementedError: a weight is sharded, and not by Transformers itself.
    """
    quantized, config = is_quantized(model), model.config
    if not quantized and not any(True for _ in _octav_configs(config)):
        yield
        return
    quantizer = None
    if quantized:
        check_finite(model)
        _check_complete(model, state_dict)
        requantize_output_embeddings(model)
        record = recorded_config(model)
        if not has_adapters(model):  # with adapters, only these are saved
            check_comes_back(model, record, state_dict)
        quantizer = OctavQuantizer(record)
        quantizer.state_dict, quantizer.saves_original_format = state_dict, in_original_format
    saved, had = copy.deepcopy(config), model.__dict__.get("hf_quantizer")
    for each in _octav_configs(saved):
        del each.quantization_config
    if quantizer is not None:
        saved.quantization_config = quantizer.quantization_config
    model.config, model.__dict__["hf_quantizer"] = saved, quantizer
    try:
        yield
    finally:
        model.config, model.__dict__["hf_quantizer"] = config, had
        if had is None:
            del model.__dict__["hf_quantizer"]


def _octav_configs(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """The configs of a model and its parts that have an ``OctavConfig``, or the dict of one."""
    recorded = config.__dict__.get("quantization_config")
    method = recorded.get("quant_method") if isinstance(recorded, dict) else None
    if isinstance(recorded, OctavConfig) or method == QUANT_METHOD:
        yield config
    for part in vars(config).values():
        if isinstance(part, PreTrainedConfig):
            yield from _octav_configs(part)


def _check_complete(model: PreTrainedModel, state_dict: Mapping[str, Tensor] | None) -> None:
    if getattr(model.config, "distributed_config", None) is not None:
        return
    for name, weight in (dict(model.named_parameters()) if state_dict is None else state_dict).items():
        shape = sharded_shape(weight)
        if shape is not None:
            raise NotImplementedError(
                f"{name} of shape {shape} is sharded, and this process has only a part of it. Trainer gathers the "
                'weights if fsdp_config contains "state_dict_type": "FULL_STATE_DICT", or DeepSpeed\'s config contains '
                '"stage3_gather_16bit_weights_on_model_save": true. In your own code, on every rank: state_dict = '
                "torch.distributed.checkpoint.state_dict.get_model_state_dict(model, options=StateDictOptions("
                "full_state_dict=True, cpu_offload=True)), or for a DeepSpeed engine "
                "engine._zero3_consolidated_16bit_state_dict(); then on rank 0: model.save_pretrained(folder, "
                "state_dict=state_dict)"
            )
