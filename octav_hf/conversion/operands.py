"""The quantizer of one operand, from its module's settings and the frozen clips that the config may hold for it."""

from ..config import ModuleSettings, OctavConfig
from ..nn import FakeQuantize, FrozenClips, QuantizedLayer, SynchronizedFakeQuantize
from ..nn.frozen_clips import clip_shape
from ..nn.granularity import Granularity, frozen_dims, shared_dims
from ..nn.stored_clips import frozen_clips
from .module_plan import QuantizerPlan


def weight_quantizer(
    settings: ModuleSettings, bits: int | None, name: str, quantized_class: type[QuantizedLayer]
) -> QuantizerPlan | None:
    """The quantizer of the weight of the layer ``name``; ``None`` without ``bits``."""
    if bits is None:
        return None
    return QuantizerPlan(
        quantized_class.weight_quantizer_class,
        {
            "num_bits": bits,
            "clip": settings.weight_clip,
            "clip_options": settings.weight_clip_options,
            "gradient_estimator": settings.weight_gradient_estimator,
            "dim": quantized_class.clip_dim if settings.weight_granularity == Granularity.CHANNEL else None,
            "name": f"{name} weight",
        },
    )


def activation_quantizer(
    config: OctavConfig,
    settings: ModuleSettings,
    bits: int | None,
    name: str,
    operand: str,
    *,
    signed: bool | None,
    granularity: str,
    asymmetric: bool = False,
) -> QuantizerPlan | None:
    """The quantizer of the activation ``operand`` of the module ``name``; ``None`` without ``bits``.

    Raises:
        ValueError: the config's frozen clips for it do not fit ``signed``, ``asymmetric`` or ``granularity``.
    """
    if bits is None:
        return None
    frozen, frozen_dim = frozen_clips(config.activation_clips, name, operand), frozen_dims(granularity)
    if frozen is not None:
        _check_frozen(frozen, f"activation_clips[{name!r}][{operand!r}]", signed, granularity, asymmetric)
    return QuantizerPlan(
        SynchronizedFakeQuantize if config.sync_activation_clips else FakeQuantize,
        {
            "num_bits": bits,
            "clip": settings.activation_clip,
            "clip_options": settings.activation_clip_options,
            "gradient_estimator": settings.activation_gradient_estimator,
            "signed": signed,
            "asymmetric": asymmetric,
            "dim": shared_dims(granularity),
            "frozen_dim": frozen_dim,
            "name": f"{name} {operand}",
            "frozen": frozen,
        },
    )


def _check_frozen(frozen: FrozenClips, where: str, signed: bool | None, granularity: str, asymmetric: bool) -> None:
    if signed and not frozen.signed:
        raise ValueError(
            f"{where} is of the unsigned grid, but unsigned_activations is False there; set it to True, or remove "
            "these clips and call calibrate_octav"
        )
    if frozen.offset and not asymmetric:
        raise ValueError(
            f"{where} is of an asymmetric grid, but asymmetric_activations is False there, or the layer is a "
            "convolution; set it to True, or remove these clips and call calibrate_octav"
        )
    shape = next((clip_shape(clip) for clip in frozen.clips if clip_shape(clip)), ())
    if shape and frozen_dims(granularity) is None:
        raise ValueError(
            f"{where} has clips of shape {shape} for one use, but by activation_granularity, {str(granularity)!r} "
            "there, a frozen one is one number; write the granularity that they were calibrated with, or remove these "
            "clips and call calibrate_octav"
        )
