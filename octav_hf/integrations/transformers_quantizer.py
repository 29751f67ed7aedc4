"""The Transformers quantizer, for loading, training and saving quantized models."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.base import HfQuantizer

from .._utils.transformers_compat import (
    has_adapters,
    is_tied,
    remove_tied_weights_from_state_dict,
    revert_weight_conversion,
    save_by_own_names,
    set_upload,
)
from ..config import QUANT_METHOD, OctavConfig
from ..conversion.convert import convert_modules, freeze_packed, restore_modules
from ..conversion.modules import layers_to_freeze
from ..conversion.plan import named_as_in, plan_conversion
from ..conversion.record import is_packed
from ..hub.upload import UploadWithCard
from ..packing.manifest import check_files, describe_tensors
from ..packing.names import FROZEN_CLIPS, PackedNames, layers_in_files
from ..packing.pack import packed_layers, prepare_packed, quantized_weights
from ..static_clips.weights import prepare_frozen

_OTHER_CLASS = (
    "Load it with the model class that it was saved from (architectures in config.json), and call {} before giving it "
    "another head"
)


@register_quantizer(QUANT_METHOD)
class OctavQuantizer(HfQuantizer):
    """Converts a model's modules before its weights are loaded.

    A checkpoint in training form has the full-precision weights under their usual names and the ``OctavConfig`` in
    ``config.json``. Frozen clips of activations are in the config, those of weights are tensors. In packed form, after
    ``pack_octav``, weights are integers of another shape under the same names; see ``packing.names``.
    """

    requires_calibration = False
    quantization_config: OctavConfig
    state_dict: Mapping[str, Tensor] | None = None  # to be saved in the place of the model's own
    _renamings: tuple[PackedNames, ...] = ()  # of the model whose weights are being loaded

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> PreTrainedModel:
        packed, frozen = self.quantization_config.packed, self.quantization_config.frozen_weight_clips
        if not self.pre_quantized:
            if packed:
                raise ValueError("packed=True is not for a float model; call pack_octav(model) after training")
            if frozen:
                raise ValueError(
                    "frozen_weight_clips=True is not for a float model; leave it out, then call "
                    "freeze_weight_clips(model)"
                )
        if (packed or frozen) and not checkpoint_files:
            what = "packed" if packed else "with frozen clips of weights"
            raise ValueError(f"a model that is {what} can only be loaded from its files, not from a state_dict")
        files = checkpoint_files or ()
        names = check_files(files, self.quantization_config) if packed else _tensor_names(files) if frozen else ()
        config = named_as_in(model, self.quantization_config) if self.pre_quantized else self.quantization_config
        convert_modules(model, config, plan_conversion(model, config, from_file=self.pre_quantized))
        if packed:
            self._prepare_packed(model, names)
        if frozen:
            self._prepare_frozen(model, names)
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        self._renamings = ()
        if self.quantization_config.packed:
            freeze_packed(model)
        self.attach(model)
        return model

    def attach(self, model: PreTrainedModel) -> None:
        """Give a quantized model what saving and uploading it needs."""
        save_by_own_names(model)
        set_upload(model, UploadWithCard(model))

    def _prepare_packed(self, model: PreTrainedModel, names: Iterable[str]) -> None:
        layers = {name: layer for name, (layer, _) in quantized_weights(model).items()}
        packed = layers_in_files(names, layers, model)
        for name, shape in _missing(model, layers, packed):
            problem = f"this packed checkpoint has no packed weight of shape {shape} for {type(model).__name__}"
            raise ValueError(f"{name}: {problem}. {_OTHER_CLASS.format('unpack_octav')}")
        prepare_packed(model, packed, self.quantization_config.frozen_weight_clips)
        self._renamings = (PackedNames(packed_layers(model), model.base_model_prefix),)

    def _prepare_frozen(self, model: PreTrainedModel, names: Iterable[str]) -> None:
        layers = layers_to_freeze(model)
        frozen = layers_in_files(names, layers, model, FROZEN_CLIPS)
        for name, shape in _missing(model, layers, frozen):
            problem = f"this checkpoint has no clips for its weight of shape {shape}, which should be frozen"
            raise ValueError(f"{name}: {problem}. {_OTHER_CLASS.format('unfreeze_weight_clips')}")
        prepare_frozen(model, frozen)

    def get_weight_conversions(self) -> list[Any]:
        # Not update_weight_conversions, which Transformers has had since 5.8, and with the model since 5.21.
        return list(self._renamings)

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        """The state dict to save, ``None`` for the model's own, and the files' metadata.

        Raises:
            NotImplementedError: packed weights are stored merged or split by Transformers.
        """
        given = None if self.state_dict is None else dict(self.state_dict)
        if not is_packed(model) or has_adapters(model):
            return given, {}
        weights = model.state_dict() if given is None else given
        names = PackedNames(packed_layers(model), model.base_model_prefix).reverse_transform()
        state = {names.rename_source_key(name)[0]: tensor for name, tensor in weights.items()}
        # As Transformers will do: the record is about the tensors in the files.
        stored = revert_weight_conversion(model, remove_tied_weights_from_state_dict(dict(state), model))
        kept = {id(tensor) for tensor in state.values()}
        for name, tensor in stored.items():
            if id(tensor) not in kept:
                raise NotImplementedError(
                    f"{name}: Transformers stores this weight of {type(model).__name__} merged with others or split, "
                    "which packed weights cannot be; leave its layer in float by exclude_modules, or save the training "
                    "form"
                )
        return state, describe_tensors(stored, self.quantization_config)

    def _dequantize(self, model: PreTrainedModel, dtype: Any = None) -> PreTrainedModel:
        restore_modules(model)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """True, since Trainer asks for evaluation too. Training a packed model fails at its first step."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return True


def _missing(model: PreTrainedModel, layers: Mapping[str, Any], found: Collection[str]) -> Iterator[tuple[str, Any]]:
    """Name and weight's shape of the layers that are not in the files; tied ones need not be. They would be random."""
    for name, layer in layers.items():
        if name not in found and not is_tied(model, f"{name}.weight"):
            yield name, tuple(layer.weight.shape)


def _tensor_names(files: Iterable[str]) -> set[str]:
    names: set[str] = set()
    for file in files:
        with safe_open(file, framework="pt") as opened:
            names.update(opened.keys())
    return names
