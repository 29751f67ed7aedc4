"""All private or undocumented names of Transformers that this package uses, with reasons.

Only `save_by_own_names` handles differences between versions >= 5.0.
"""

import functools
import inspect
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from transformers import PreTrainedModel, TrainerCallback, conversion_mapping, core_model_loading, modeling_utils
from transformers.loss import loss_utils
from transformers.trainer_callback import CallbackHandler

# Conversion of names and tensors between files and a model. No documented function tells which layers are packed in
# files, or the names under which packed weights will be saved, which their record needs.
WeightConverter = core_model_loading.WeightConverter
WeightRenaming = core_model_loading.WeightRenaming
get_model_conversion_mapping = conversion_mapping.get_model_conversion_mapping
remove_tied_weights_from_state_dict = modeling_utils.remove_tied_weights_from_state_dict
rename_source_key = core_model_loading.rename_source_key
revert_weight_conversion = core_model_loading.revert_weight_conversion

# A model's loss function tells whether it shifts the labels, which distillation must count in the same way.
LOSS_MAPPING, ForCausalLMLoss = loss_utils.LOSS_MAPPING, loss_utils.ForCausalLMLoss


def task_mapping() -> Mapping[str, Any]:
    """Task -> names of model classes, for the model card; ``pipelines``, the public list, imports every model."""
    # Imported here because it takes a seventh of a second.
    from transformers.modelcard import TASK_MAPPING

    return TASK_MAPPING


def save_by_own_names(model: PreTrainedModel) -> None:
    """Save a model with the names in its state dict instead of the legacy names of the file it was loaded from.

    Transformers saves ``LayerNorm.weight`` as ``LayerNorm.gamma`` if it was loaded under that name, as from BERT's own
    files, and before 5.6 always. Trainer resumes with the names in the state dict and skips others. ``remove_octav``
    does not undo this.
    """
    used = getattr(model, "_weight_conversions", None)
    if used:
        legacy = [each.source_patterns for each in conversion_mapping.get_checkpoint_conversion_mapping("legacy")]
        model._weight_conversions = [each for each in used if each.source_patterns not in legacy]  # type: ignore[assignment]


def ignored_on_save(model: PreTrainedModel) -> Collection[str]:
    """The tensors that a model's class computes, such as Marian's positions, and that are therefore not saved."""
    return model._keys_to_ignore_on_save or ()


def tied_to(model: PreTrainedModel, parameter: str) -> set[str]:
    """The other parameters to which Transformers ties a parameter; the attribute is undocumented."""
    tied = model.all_tied_weights_keys
    source = tied.get(parameter, parameter)
    return ({source} | {name for name, other in tied.items() if other == source}) - {parameter}


def untie(model: PreTrainedModel, parameter: str) -> None:
    """Keep Transformers from tying a weight that was saved separately, even if the config says that it is tied."""
    model.all_tied_weights_keys.pop(parameter, None)


def has_adapters(model: PreTrainedModel) -> bool:
    """Whether Transformers' ``add_adapter`` has added PEFT adapters; the public query raises an error if not."""
    return getattr(model, "_hf_peft_config_loaded", False)


def attn_implementation(config: Any) -> str | None:
    """A config's attention implementation: a public argument, but a private attribute."""
    return getattr(config, "_attn_implementation", None)


def mark_as_float(model: PreTrainedModel) -> None:
    """Mark a model's config as not quantized, which ``remove_quantization_config`` does not do."""
    model.config._is_quantized = False


def argument_of_from_pretrained(name: str) -> Any:
    """An argument of the innermost ``from_pretrained`` on the stack, which quantizers do not get; else ``None``."""
    code = inspect.unwrap(PreTrainedModel.from_pretrained.__func__).__code__  # type: ignore[attr-defined]
    frame = inspect.currentframe()
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return None if frame is None else frame.f_locals.get(name)


def set_upload(model: PreTrainedModel, upload: Any) -> None:
    """Replace the upload of ``push_to_hub`` and ``save_pretrained``; there is no documented hook before it."""
    model._upload_modified_files = upload  # type: ignore[method-assign]


def unset_upload(model: Any) -> None:
    """Undo `set_upload`."""
    model.__dict__.pop("_upload_modified_files", None)


def upload(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    """Transformers' own upload."""
    return type(model)._upload_modified_files(model, *args, **kwargs)


def add_trainer_callback(callback: type[TrainerCallback]) -> None:
    """Give every Trainer created from now on an instance of ``callback``, called after all others.

    The undocumented list ``trainer.DEFAULT_CALLBACKS`` would also work, but importing its module takes half a second.
    """
    initialize = CallbackHandler.__init__

    @functools.wraps(initialize)
    def __init__(self: CallbackHandler, callbacks: Iterable[Any], *args: Any, **kwargs: Any) -> None:
        initialize(self, [*callbacks, callback], *args, **kwargs)

    CallbackHandler.__init__ = __init__  # type: ignore[method-assign]


def call_before_others(callback: type[TrainerCallback]) -> None:
    """Have Trainer call callbacks of a class before all others, such as those that report what it adds to the logs.

    Trainer puts a user's callbacks behind its own, and documents no way to add to the logs but a subclass of it.
    """
    add_callback = CallbackHandler.add_callback

    @functools.wraps(add_callback)
    def add_in_order(self: CallbackHandler, added: Any) -> None:
        add_callback(self, added)
        self.callbacks.sort(key=lambda each: not isinstance(each, callback))

    CallbackHandler.add_callback = add_in_order  # type: ignore[method-assign]
