"""Deciding which layer with a weight gets which quantizers; the layers are those registered in ``nn``."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from .._utils.torch_private import own_parameters
from ..config import ModuleSettings, OctavConfig
from ..nn import FakeQuantize, QuantizedAttention, QuantizedLayer, SynchronizedFakeQuantize, quantized_class_of
from ..nn.frozen_clips import clip_shape
from ..nn.granularity import frozen_dims, shared_dims
from ..nn.stored_clips import frozen_clips
from .first_last import first_and_last

# A norm multiplies element by element, whatever the shape of its weight.
_NORMS = (nn.LayerNorm, nn.RMSNorm)


@dataclass(frozen=True)
class Conversion:
    """One module to convert, and its quantizers by operand (``nn.Identity`` for an operand left in float)."""

    name: str
    module: nn.Module
    quantizers: dict[str, nn.Module]

    def apply(self) -> None:
        """Convert the module in place."""
        quantized_class = quantized_class_of(self.module)
        if quantized_class is not None:
            quantized_class.convert(self.module, *(self.quantizers[name] for name in quantized_class.operands))
        else:
            QuantizedAttention.convert(self.module, nn.ModuleDict(self.quantizers), self.name)


def plan_layers(model: nn.Module, config: OctavConfig) -> Iterator[Conversion]:
    """The conversions of the layers with a weight that are not quantized yet.

    Raises:
        ValueError: a layer cannot be quantized; the message names it and what to write instead.
    """
    edges = () if config.first_last_bits is None else first_and_last(model, config)
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLayer) or config.excluded_by(name):
            continue
        settings = config.settings_for(name)
        quantized_class = quantized_class_of(module)
        if quantized_class is None:
            if settings.weight_bits or settings.activation_bits:
                _check_holds_no_weight(name, module)
            continue
        bits = {operand: getattr(settings, field) for operand, field in quantized_class.operands.items()}
        if name in edges:
            bits = _first_last_bits(bits, name, config)
        if not any(bits.values()):
            continue
        _check_convertible(name, module, quantized_class)
        if settings.weight_granularity not in quantized_class.granularities:
            raise ValueError(
                f"{name}: the weight of {type(module).__name__} has one clip per row, not per "
                f"{settings.weight_granularity}; write module_overrides={{{name!r}: {{'weight_granularity': 'row'}}}}"
            )
        signed = None if settings.unsigned_activations else True
        quantizers = {
            operand: activation_quantizer(
                config,
                bits[operand],
                name,
                operand,
                signed=signed,
                shifted=_is_shifted(config, name, module),
                granularity=_input_granularity(config, name, module),
            )
            if operand == "input"
            else weight_quantizer(settings, bits[operand], name, quantized_class)
            for operand in quantized_class.operands
        }
        yield Conversion(name, module, quantizers)


def weight_quantizer(
    settings: ModuleSettings, bits: int | None, name: str, quantized_class: type[QuantizedLayer]
) -> nn.Module:
    """The quantizer of the weight of the layer ``name``."""
    if bits is None:
        return nn.Identity()
    return quantized_class.weight_quantizer_class(
        bits,
        clip=settings.weight_clip,
        clip_options=settings.weight_clip_options,
        gradient=settings.weight_gradient,
        dim=quantized_class.clip_dim if settings.weight_granularity == "row" else None,
        name=f"{name} weight",
    )


def activation_quantizer(
    config: OctavConfig,
    bits: int | None,
    name: str,
    operand: str,
    *,
    signed: bool | None,
    granularity: str,
    shifted: bool = False,
) -> nn.Module:
    """The quantizer of the activation ``operand`` of the module ``name``.

    Raises:
        ValueError: the operand is always signed, or never shifted, and its frozen clips are not so; or they are more
            than its granularity asks for.
    """
    if bits is None:
        return nn.Identity()
    settings, frozen = config.settings_for(name), frozen_clips(config.activation_clips, name, operand)
    if frozen is not None and signed and not frozen.signed:
        raise ValueError(
            f"activation_clips[{name!r}][{operand!r}] is of the unsigned grid, but unsigned_activations is False there;"
            " set it to True, or remove these clips and call calibrate_octav"
        )
    if frozen is not None and frozen.lowest and not shifted:
        raise ValueError(
            f"activation_clips[{name!r}][{operand!r}] is of a shifted grid, but shifted_activations is False there, or "
            "the layer is a convolution; set it to True, or remove these clips and call calibrate_octav"
        )
    shared = frozen_dims(granularity)
    parts = next((clip_shape(clip) for clip in frozen.clips if clip_shape(clip)), ()) if frozen else ()
    if parts and shared is None:
        raise ValueError(
            f"activation_clips[{name!r}][{operand!r}] has clips of shape {parts} for one use, but by "
            f"activation_granularity, {granularity!r} there, a frozen one is one number; write the granularity that "
            "they were calibrated with, or remove these clips and call calibrate_octav"
        )
    quantizer_class = SynchronizedFakeQuantize if config.sync_activation_clips else FakeQuantize
    return quantizer_class(
        bits,
        clip=settings.activation_clip,
        clip_options=settings.activation_clip_options,
        gradient=settings.activation_gradient,
        signed=signed,
        shifted=shifted,
        dim=shared_dims(granularity),
        frozen_dim=shared,
        name=f"{name} {operand}",
        frozen=frozen,
    )


def _input_granularity(config: OctavConfig, name: str, module: nn.Module) -> str:
    """What a clip of this layer's input is for; that of a convolution has one per tensor, whatever linear layers have.

    Raises:
        ValueError: the config asks this very layer for another one.
    """
    granularity, quantized_class = config.settings_for(name).granularity("input"), quantized_class_of(module)
    if quantized_class is None or granularity in quantized_class.input_granularities:
        return granularity
    asked = config.module_overrides.get(name, {}).get("activation_granularity", {})
    if asked.get("input") == granularity:
        raise ValueError(
            f"{name}: the input of this {type(module).__name__} has one clip per tensor, not per {granularity}: the "
            "layer sums over positions, so the scale of one does not factor out; write "
            f"module_overrides={{{name!r}: {{'activation_granularity': {{'input': 'tensor'}}}}}}, or leave it out"
        )
    return "tensor"


def _is_shifted(config: OctavConfig, name: str, module: nn.Module) -> bool:
    """Whether the grid of this layer's input may be shifted; never that of a convolution, whatever linear layers have.

    Raises:
        ValueError: the config asks it of this very layer.
    """
    quantized_class = quantized_class_of(module)
    if quantized_class is None or quantized_class.input_can_be_shifted:
        return config.settings_for(name).shifted_activations
    if config.module_overrides.get(name, {}).get("shifted_activations"):
        raise ValueError(
            f"{name}: the input of this {type(module).__name__} cannot be shifted, since the zeros that it is padded "
            f"with are not; leave shifted_activations out of module_overrides[{name!r}]"
        )
    return False


def _first_last_bits(bits: dict[str, int | None], name: str, config: OctavConfig) -> dict[str, int | None]:
    """``first_last_bits`` for each operand that is quantized."""
    if not any(bits.values()):
        raise ValueError(
            f"first_last_bits={config.first_last_bits} has no effect on {name}, whose weight_bits and activation_bits "
            "are None; set one of them, or first_last_bits=None"
        )
    return {operand: number and config.first_last_bits for operand, number in bits.items()}


def unknown_weights(module: nn.Module) -> list[str]:
    """Names of the weights of two or more dimensions in a module that is no registered layer and no norm."""
    if quantized_class_of(module) is not None or isinstance(module, _NORMS):
        return []
    parameters = own_parameters(module).items()
    return [name for name, value in parameters if "weight" in name and value is not None and value.dim() > 1]


def _check_holds_no_weight(name: str, module: nn.Module) -> None:
    unknown = unknown_weights(module)
    if unknown:
        shape = tuple(module.get_parameter(unknown[0]).shape)
        raise ValueError(
            f"{name}: {type(module).__name__} with {unknown[0]} of shape {shape} is not a layer that can be quantized; "
            "name it in exclude_modules to leave it in float"
        )


def _check_convertible(name: str, module: nn.Module, quantized_class: type[QuantizedLayer]) -> None:
    float_class = quantized_class.float_class
    remedy = "name it in exclude_modules to leave it in float"
    described = type(module).__name__
    weight = own_parameters(module).get("weight")
    if weight is not None:
        described += f" with weight of shape {tuple(weight.shape)}"
    if type(module) is not float_class:
        raise ValueError(
            f"{name}: {described} is a subclass of nn.{float_class.__name__} that may compute something else; {remedy}"
        )
    refusal = quantized_class.refusal(module)
    if refusal:
        raise ValueError(f"{name}: {described} cannot be quantized: {refusal}, or {remedy}")
