"""The quantizer of one operand, from its module's settings and the frozen clips that the config may hold for it."""

from ..nn import FakeQuantize, FrozenClips, QuantizedLayer, SynchronizedFakeQuantize
from ..nn.frozen_clips import clip_shape
from ..nn.granularity import Granularity, frozen_dims, shared_dims
from ..nn.stored_clips import frozen_clips
from .request import QuantizerPlan, Request


def weight_quantizer(
    request: Request, name: str, bits: int | None, layer_class: type[QuantizedLayer]
) -> QuantizerPlan | None:
    """The quantizer of the weight of the layer ``name``; ``None`` without ``bits``."""
    if bits is None:
        return None
    settings = request.settings[name]
    kwargs = {
        "clip": settings.weight_clip,
        "clip_options": settings.weight_clip_options,
        "gradient_estimator": settings.weight_gradient_estimator,
        "dim": layer_class.clip_dim if settings.weight_granularity == Granularity.CHANNEL else None,
    }
    return QuantizerPlan(layer_class.weight_quantizer_class, {"num_bits": bits, "name": f"{name} weight"} | kwargs)


def activation_quantizer(
    request: Request,
    name: str,
    operand: str,
    bits: int | None,
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
    settings, frozen = request.settings[name], frozen_clips(request.config.activation_clips, name, operand)
    if frozen is not None:
        _check_frozen(frozen, f"activation_clips[{name!r}][{operand!r}]", signed, granularity, asymmetric)
    kwargs = {
        "clip": settings.activation_clip,
        "clip_options": settings.activation_clip_options,
        "gradient_estimator": settings.activation_gradient_estimator,
        "signed": signed,
        "asymmetric": asymmetric,
        "dim": shared_dims(granularity),
        "frozen_dim": frozen_dims(granularity),
        "frozen": frozen,
    }
    quantizer_class = SynchronizedFakeQuantize if request.config.sync_activation_clips else FakeQuantize
    return QuantizerPlan(quantizer_class, {"num_bits": bits, "name": f"{name} {operand}"} | kwargs)


def _check_frozen(frozen: FrozenClips, where: str, signed: bool | None, granularity: str, asymmetric: bool) -> None:
    shape = next((clip_shape(clip) for clip in frozen.clips if clip_shape(clip)), ())
    if signed and not frozen.signed:
        problem = "is of the unsigned grid, but unsigned_activations is False there; set it to True"
    elif frozen.offset and not asymmetric:
        problem = (
            "is of an asymmetric grid, but asymmetric_activations is False there, or the layer is a convolution; set "
            "it to True"
        )
    elif shape and frozen_dims(granularity) is None:
        problem = (
            f"has clips of shape {shape} for one call, but by activation_granularity, {str(granularity)!r} there, a "
            "frozen one is one number; write the granularity that they were calibrated with"
        )
    else:
        return
    raise ValueError(f"{where} {problem}, or remove these clips and call calibrate_octav")
