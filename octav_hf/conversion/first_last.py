"""Find the first and the last layer of an image classifier, for ``OctavConfig.first_last_bits``."""

from torch import nn

from .._utils.name_patterns import matches
from ..config import OctavConfig
from ..nn import quantized_class_of

_BITS_FIELDS = ("weight_bits", "activation_bits")


def first_and_last(model: nn.Module) -> tuple[str, str]:
    """Names of the first and the last layer of ``model``, in the order in which its modules are defined.

    The first layer must be a convolution and the last a linear layer. In a Transformers model, they must also have
    ``num_channels`` inputs and ``num_labels`` outputs as in its config, and there must be only one such head.

    Raises:
        ValueError: these conditions do not hold; the message tells which one.
    """
    layers = []
    for name, module in model.named_modules():
        quantized_class = quantized_class_of(module)
        if quantized_class is not None and "input" in quantized_class.operands:
            layers.append((name, module, quantized_class.kind))
    described = type(model).__name__
    if len(layers) < 2:
        raise _unclear(f"{described} has fewer than two layers")
    (first_name, first, first_kind), (last_name, last, last_kind) = layers[0], layers[-1]
    if first_kind != "convolution":
        raise _unclear(f"the first layer of {described}, {first_name}, is a {type(first).__name__}, not a convolution")
    if last_kind != "linear":
        raise _unclear(f"the last layer of {described}, {last_name}, is a {type(last).__name__}, not a linear layer")
    model_config = getattr(model, "config", None)
    channels, labels = getattr(model_config, "num_channels", None), getattr(model_config, "num_labels", None)
    if channels is not None and first.in_channels != channels:
        raise _unclear(f"the first layer, {first_name}, has {first.in_channels} inputs, but images have {channels}")
    if labels is not None:
        if last.out_features != labels:
            raise _unclear(f"the last layer, {last_name}, has {last.out_features} outputs for {labels} labels")
        for name, module, kind in layers[:-1]:
            if kind == "linear" and module.weight.shape == last.weight.shape:
                raise _unclear(f"{described} has two heads, {name} and {last_name}")
    return first_name, last_name


def check_nothing_else_is_asked(name: str, config: OctavConfig) -> None:
    """Raise ``ValueError`` if another field of the config contradicts ``first_last_bits`` for the layer ``name``."""
    remedy = f"both match {name!r}; change the pattern, or set first_last_bits=None"
    excluding = next((pattern for pattern in config.exclude_modules if matches(pattern, name)), None)
    if excluding is not None:
        raise ValueError(f"first_last_bits and exclude_modules {excluding!r} contradict: {remedy}")
    if config.left_out([name]):
        raise ValueError(
            f"first_last_bits and target_modules {config.target_modules!r} contradict: the latter leaves {name!r} in "
            "float; target it too, or set first_last_bits=None"
        )
    for pattern, override in config.module_overrides.items():
        fields = [field for field in _BITS_FIELDS if field in override]
        if fields and matches(pattern, name):
            raise ValueError(f"first_last_bits and module_overrides {pattern!r} both set {fields[0]}: {remedy}")


def _unclear(problem: str) -> ValueError:
    return ValueError(
        f"first_last_bits: {problem}, so the first and the last layer are not clear; set first_last_bits=None and name "
        "them: module_overrides={'NAME': {'weight_bits': 8, 'activation_bits': 8}}"
    )
