"""The Transformers quantizer, which loads, trains and saves quantized models."""

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.base import HfQuantizer

from .._utils.transformers_compat import (
    argument_of_from_pretrained,
    has_adapters,
    ignored_on_save,
    remove_tied_weights_from_state_dict,
    revert_weight_conversion,
    save_by_own_names,
    set_upload,
    tied_to,
    untie,
)
from ..config import QUANT_METHOD, OctavConfig
from ..conversion.convert import convert_modules, freeze_packed, restore_modules
from ..conversion.modules import start_on_devices
from ..conversion.plan import check_for_float_model, named_as_in, plan_conversion
from ..conversion.record import is_packed
from ..hub.upload import UploadWithCard
from ..nn import PackedLayer, PackedWeight
from ..packing.clips_in_files import prepare_frozen
from ..packing.clips_of_version_1 import OperandClips, freeze_version_1, match_version_1
from ..packing.manifest import TensorRecord, check_files, describe_tensors
from ..packing.names import SCALE, PackedNames, layers_in_files
from ..packing.pack import packed_layers, packed_to_load

_OTHER_CLASS = (
    "Load it with the model class that it was saved with (architectures in config.json), and call {} before changing "
    "its head"
)


@register_quantizer(QUANT_METHOD)
class OctavQuantizer(HfQuantizer):
    """Converts a model's modules before its weights are loaded.

    A checkpoint in training form contains full-precision weights under their usual names, frozen clips as tensors, and
    the ``OctavConfig`` in ``config.json``. In packed form, after ``pack_octav``, weights are packed integers of another
    shape under the same names; see ``packing.names``.
    """

    requires_calibration = False
    quantization_config: OctavConfig
    state_dict: Mapping[str, Tensor] | None = None  # saved instead of the model's own
    saves_original_format = True  # argument of ``save_pretrained``: whether to convert names and tensors back
    # Set while weights are loaded:
    _renamings: tuple[PackedNames, ...] = ()
    _clips_of_version_1: tuple[OperandClips, ...] = ()
    _new_layers: Sequence[Any] = ()  # layers whose weight clips are frozen once the weight is initialized

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> PreTrainedModel:
        if not self.pre_quantized:
            check_for_float_model(self.quantization_config)
            convert_modules(model, self.quantization_config, plan_conversion(model, self.quantization_config))
            return model
        packed = self.quantization_config.packed
        if packed and not checkpoint_files:
            raise ValueError(
                "a packed model can only be loaded from its files, not from a state_dict; pass the folder that it was "
                "saved to"
            )
        records = check_files(checkpoint_files or (), self.quantization_config) if packed else {}
        config = named_as_in(model, self.quantization_config)
        plan = plan_conversion(model, config, from_file=True)
        convert_modules(model, config, plan)
        frozen = {each.name for each in plan if each.frozen_weight_clips}
        if packed:
            self._prepare_packed(model, records, frozen)
        state_dict = argument_of_from_pretrained("state_dict")
        checkpoint = checkpoint_files or () if state_dict is None else state_dict
        self._new_layers = prepare_frozen(model, checkpoint, frozen_weights=frozen)
        self._clips_of_version_1 = match_version_1(model, self.quantization_config.clips_of_version_1)
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        self._renamings = ()
        freeze_version_1(self._clips_of_version_1)
        for layer in self._new_layers:
            if not layer.weight.is_meta:  # offloaded
                layer.weight_quantizer.freeze_at(layer.weight)
        self._clips_of_version_1 = self._new_layers = ()
        self.quantization_config.__dict__.pop("clips_of_version_1", None)
        if self.quantization_config.packed:
            freeze_packed(model)
        start_on_devices(model)
        self.attach(model)
        return model

    def attach(self, model: PreTrainedModel) -> None:
        """Set the attributes that saving and uploading a quantized model needs."""
        save_by_own_names(model)
        set_upload(model, UploadWithCard(model))

    def _prepare_packed(
        self, model: PreTrainedModel, records: Mapping[str, TensorRecord], frozen: Container[str]
    ) -> None:
        weights = packed_to_load(model, frozen)
        scales = layers_in_files(records, weights, model)
        found = {name: weights[name] for name, scale in scales.items() if _fits(weights[name], records, scale)}
        tied = {other for name in found for other in _tied_layers(model, name)}
        stored = layers_in_files(records, {*weights, *tied}, model, "weight")
        floating = {
            name
            for name, in_file in stored.items()
            if name not in found and (name not in weights or records[in_file].shape == list(weights[name].shape))
        }
        for name, shape in _missing(model, [*weights, *sorted(tied)], found, floating):
            problem = f"this packed checkpoint has no packed weight of shape {shape} for {type(model).__name__}"
            raise ValueError(f"{name}: {problem}. {_OTHER_CLASS.format('unpack_octav')}")
        for name, weight in found.items():
            layer: Any = model.get_submodule(name)
            PackedLayer.pack(layer, weight)
            untie(model, f"{name}.weight")
        self._renamings = (PackedNames(packed_layers(model), model.base_model_prefix),)

    def get_weight_conversions(self) -> list[Any]:
        # update_weight_conversions exists only since Transformers 5.8, and gets the model since 5.21.
        return list(self._renamings)

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        """The state dict to save (``None``: the model's own), and the metadata of the files.

        Raises:
            NotImplementedError: Transformers stores a packed weight merged or split, or a tensor is offloaded.
        """
        given = None if self.state_dict is None else dict(self.state_dict)
        if not is_packed(model) or has_adapters(model):
            return given, {}
        weights = model.state_dict() if given is None else given
        names = PackedNames(packed_layers(model), model.base_model_prefix).reverse_transform()
        state = {names.rename_source_key(name)[0]: tensor for name, tensor in weights.items()}
        for name, tensor in state.items():
            if tensor.is_meta:
                raise NotImplementedError(
                    f"{name} of shape {tuple(tensor.shape)} is offloaded, but saving a packed checkpoint needs all "
                    "values to compute their hashes; load the model without a device_map before saving it"
                )
        # The record describes the tensors in the files, so leave out, rename and convert them as Transformers will do.
        saved = {name: tensor for name, tensor in state.items() if name not in ignored_on_save(model)}
        stored = remove_tied_weights_from_state_dict(saved, model)
        stored = revert_weight_conversion(model, stored) if self.saves_original_format else stored
        kept = {id(tensor) for tensor in stored.values()}
        for layer in packed_layers(model):
            if f"{layer}.weight" in saved and id(saved[f"{layer}.weight"]) not in kept:
                raise NotImplementedError(
                    f"{layer}: Transformers stores this weight of {type(model).__name__} merged with others or split, "
                    "which is not possible for packed weights; add the layer to exclude_modules, or save the training "
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
        """True, because Trainer checks this for evaluation too. Training a packed model fails in the first step."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return True


def _missing(
    model: PreTrainedModel, layers: Iterable[str], packed: Container[str], floating: Container[str]
) -> Iterator[tuple[str, Any]]:
    """Name and weight shape of the layers that are missing in the files, so that their weights would be random.

    A layer whose weight is tied may be missing, unless a layer that it is tied to is ``packed`` and none is
    ``floating``: a packed layer has no weight to share.
    """
    for name in layers:
        tied = _tied_layers(model, name)
        if name in packed or any(each in floating for each in (name, *tied)):
            continue
        if not tied or any(other in packed for other in tied):
            yield name, tuple(model.get_parameter(f"{name}.weight").shape)


def _tied_layers(model: PreTrainedModel, name: str) -> list[str]:
    return sorted(other.removesuffix(".weight") for other in tied_to(model, f"{name}.weight"))


def _fits(weight: PackedWeight, records: Mapping[str, TensorRecord], scale: str) -> bool:
    """Whether the tensors of ``weight`` have the same shapes in the files, where its scales are called ``scale``."""
    expected = {scale: weight.scale.shape, scale.removesuffix(SCALE) + "weight": weight.packed_data.shape}
    return all(name in records and records[name].shape == list(shape) for name, shape in expected.items())
