"""Names of packed tensors in files and in the model.

In a file, a packed weight keeps the name ``<layer>.weight``, so that Transformers without this package fails because of
its shape instead of initializing the weight randomly. Its scales are ``<layer>.weight_scale``.
"""

from collections.abc import Iterable

from transformers import PreTrainedModel

from .._utils.transformers_compat import (
    WeightConverter,
    WeightRenaming,
    get_model_conversion_mapping,
    rename_source_key,
)

SCALE = "weight_scale"

# Name of a layer's tensor in files -> name in the model.
_IN_MODEL = {"weight": "weight_quantizer.packed_data", SCALE: "weight_quantizer.scale"}


class PackedNames(WeightRenaming):
    """Renames the tensors of packed ``layers`` from files to the model, as a step of Transformers' loading."""

    def __init__(self, layers: Iterable[str], base_model_prefix: str):
        super().__init__("weight", "weight")  # unused patterns
        self._names = {
            f"{variant}.{in_file}": f"{variant}.{in_model}"
            for layer in layers
            for variant in name_variants(layer, base_model_prefix)
            for in_file, in_model in _IN_MODEL.items()
        }

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        """The new name, and the old name if it differs."""
        renamed = self._names.get(source_key, source_key)
        if renamed == source_key:
            return source_key, None
        self._was_used = True
        return renamed, source_key

    def reverse_transform(self) -> "PackedNames":
        """Renames from the model to files."""
        reverse = PackedNames((), "")
        reverse._names = {in_model: in_file for in_file, in_model in self._names.items()}
        return reverse


def layers_in_files(
    names: Iterable[str], layers: Iterable[str], model: PreTrainedModel, tensor: str = SCALE
) -> dict[str, str]:
    """Layer -> name of its ``tensor`` in the files, for those of ``layers`` that have one there; called before loading.

    Packed layers are those with scales.
    """
    found = names_in_model((name for name in names if name.endswith(f".{tensor}")), model)
    return {
        layer: found[f"{variant}.{tensor}"][0]
        for layer in layers
        for variant in name_variants(layer, model.base_model_prefix)
        if f"{variant}.{tensor}" in found
    }


def names_in_model(names: Iterable[str], model: PreTrainedModel) -> dict[str, tuple[str, bool]]:
    """Name in the model (before the prefix is corrected) -> name in files, and whether the tensor itself is unchanged.

    Transformers renames, merges or splits the tensors of some models.
    """
    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    renamed = ((name, rename_source_key(name, renamings, converters)) for name in names)
    return {in_model: (name, converter is None) for name, (in_model, converter) in renamed}


def name_variants(layer: str, base_model_prefix: str) -> tuple[str, ...]:
    """A layer's possible names in a file: with and without the base model's prefix, such as ``bert``."""
    prefix = f"{base_model_prefix}."
    return layer, f"{prefix}{layer}", layer.removeprefix(prefix)
