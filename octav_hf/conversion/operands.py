"""Plan the quantizer of one operand from its module's settings."""

from ..nn import FakeQuantize, QuantizedLayer, SynchronizedFakeQuantize
from ..nn.granularity import Granularity, frozen_dims, shared_dims
from .request import QuantizerPlan, Request


def weight_quantizer(
    request: Request, name: str, bits: int | None, layer_class: type[QuantizedLayer], granularity: Granularity
) -> QuantizerPlan | None:
    """The quantizer of the weight of the layer ``name``; ``None`` without ``bits``."""
    if bits is None:
        return None
    settings = request.settings[name]
    kwargs = {
        "clip": settings.weight_clip,
        "clip_options": settings.weight_clip_options,
        "gradient_estimator": settings.weight_gradient_estimator,
        "dim": None if granularity == Granularity.TENSOR else layer_class.clip_dim,
        "group_size": settings.group_size if granularity == Granularity.GROUP else None,
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
    """The quantizer of the activation ``operand`` of the module ``name``; ``None`` without ``bits``."""
    if bits is None:
        return None
    settings = request.settings[name]
    group_size = settings.group_size if granularity == Granularity.GROUP else None
    kwargs = {
        "clip": settings.activation_clip,
        "clip_options": settings.activation_clip_options,
        "gradient_estimator": settings.activation_gradient_estimator,
        "signed": signed,
        "asymmetric": asymmetric,
        "dim": shared_dims(granularity),
        "frozen_dim": frozen_dims(operand, granularity),
        "group_size": group_size,
        "frozen_group_size": group_size if operand == "input" else None,
    }
    quantizer_class = SynchronizedFakeQuantize if request.config.sync_activation_clips else FakeQuantize
    return QuantizerPlan(quantizer_class, {"num_bits": bits, "name": f"{name} {operand}"} | kwargs)
