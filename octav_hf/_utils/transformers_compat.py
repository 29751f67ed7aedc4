"""What is private to Transformers, or not documented, and used here, each with the reason.

Versions from 5.0 on differ in `save_by_own_names`, which does for all of them what none does by itself.
"""

import inspect
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedModel, conversion_mapping, core_model_loading, modeling_utils
from transformers.loss import loss_utils

# How names and tensors in files become a model's, and back. Nothing documented tells which layers come packed, nor by
# which names packed weights will be written, which their record is about.
WeightConverter = core_model_loading.WeightConverter
WeightRenaming = core_model_loading.WeightRenaming
get_model_conversion_mapping = conversion_mapping.get_model_conversion_mapping
remove_tied_weights_from_state_dict = modeling_utils.remove_tied_weights_from_state_dict
rename_source_key = core_model_loading.rename_source_key
revert_weight_conversion = core_model_loading.revert_weight_conversion

# Whether a model's loss shifts the labels, so that distillation counts them alike, shows in which function this gives.
LOSS_MAPPING, ForCausalLMLoss = loss_utils.LOSS_MAPPING, loss_utils.ForCausalLMLoss


def task_mapping() -> Mapping[str, Any]:
    """Names of model classes by task, for the model card; ``pipelines``, the public list, imports every model."""
    # Not at the top: it costs every import of the package a seventh of a second.
    from transformers.modelcard import TASK_MAPPING

    return TASK_MAPPING


def save_by_own_names(model: PreTrainedModel) -> None:
    """Have a model saved by the names in its state dict, not by the old ones that its file may have had.

    Transformers saves ``LayerNorm.weight`` as ``LayerNorm.gamma`` again if it was loaded from that, as it is in BERT's
    own files, and before 5.6 in any case. Trainer resumes by the names in the state dict, and leaves out the rest.
    """
    legacy = [each.source_patterns for each in conversion_mapping.get_checkpoint_conversion_mapping("legacy")]
    used = getattr(model, "_weight_conversions", None)
    if used:
        model._weight_conversions = [each for each in used if each.source_patterns not in legacy]  # type: ignore[assignment]


def is_tied(model: PreTrainedModel, parameter: str) -> bool:
    """Whether Transformers gives a parameter another one's values, or its own to another one; not documented."""
    return parameter in {*model.all_tied_weights_keys, *model.all_tied_weights_keys.values()}


def has_adapters(model: PreTrainedModel) -> bool:
    """Whether Transformers' own ``add_adapter`` put PEFT's adapters in; asking in public raises an error if not."""
    return getattr(model, "_hf_peft_config_loaded", False)


def attn_implementation(config: Any) -> str | None:
    """What a model computes attention with; a config takes it as a public argument, but has it under this name."""
    return getattr(config, "_attn_implementation", None)


def mark_as_float(model: PreTrainedModel) -> None:
    """Say of a model that it is not quantized, after ``remove_quantization_config``, which leaves its config's mark."""
    model.config._is_quantized = False


def argument_of_save_pretrained(name: str) -> Any:
    """An argument of the innermost ``save_pretrained`` on the stack, which tells its quantizer nothing; or ``None``."""
    frame = inspect.currentframe()
    while frame is not None and frame.f_code is not inspect.unwrap(PreTrainedModel.save_pretrained).__code__:
        frame = frame.f_back
    return None if frame is None else frame.f_locals.get(name)


def set_upload(model: PreTrainedModel, upload: Any) -> None:
    """Have ``push_to_hub`` and ``save_pretrained`` end with ``upload``; no documented hook comes before the upload."""
    model._upload_modified_files = upload  # type: ignore[method-assign]


def unset_upload(model: Any) -> None:
    """Undo `set_upload`."""
    model.__dict__.pop("_upload_modified_files", None)


def upload(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    """What Transformers itself ends those methods with."""
    return type(model)._upload_modified_files(model, *args, **kwargs)
