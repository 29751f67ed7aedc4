"""A closed-form start: weights of linear layers that give the teacher's outputs on quantized inputs."""

import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from transformers.utils.logging import tqdm

from .._utils.forward_pass import Batch, check_batch, device_of, in_evaluation_mode, on_device, without_trace
from .._utils.sharded_weights import sharded_shape
from .._utils.torch_private import own_parameters, uncompiled
from ..conversion.modules import shared_weights
from ..conversion.record import check_quantized, is_packed
from ..nn import QuantizedLayer
from .layer_outputs import groups_by_input, layer_sums
from .least_squares import LeastSquares

logger = logging.getLogger(__name__)


class LayerError(NamedTuple):
    """A layer's squared error against the teacher's outputs, over the sum of their squares."""

    before: float
    after: float


def reconstruct(
    model: nn.Module,
    teacher: nn.Module,
    batches: Iterable[Batch],
    *,
    ridge: float = 0.01,
    progress_bar: bool = True,
) -> dict[str, LayerError]:
    """Give quantized linear layers the weights that come closest to the teacher's outputs, without training.

    Layer by layer, in the order in which they run, with the layers before them reconstructed already. With the layer's
    quantized inputs ``X`` in the quantized model, the outputs ``Y`` of the teacher's layer of the same name, both
    ``[tokens, features]`` over all batches, and the present weight ``W``,

        W* = (Yᵀ X + λ W)(Xᵀ X + λ I)⁻¹,   λ = ridge * mean(diag(Xᵀ X)),

    which minimises ``‖Y - X W*ᵀ‖² + λ ‖W* - W‖²``. With a bias, ``X`` and ``Y`` are without their means, and the bias
    is then the mean of ``Y - X Q(W*)ᵀ``. As training and inference quantize ``W*``, it is taken only if its error,
    quantized, is lower than that of ``W``, quantized, with its own best bias. Padding that an attention mask shows does
    not count.

    Where training follows, it starts from here. Clips of activations that are to be static are calibrated afterwards.

    The cost is, for each group of layers with one input (query, key and value), one forward pass of both models up to
    it, so about half as many passes over the batches as there are groups; and the memory of one such matrix ``Xᵀ X`` in
    float64.

    Args:
        model: one that ``apply_octav`` quantized, changed in place. Its mode, buffers and the random state are
            restored.
        teacher: a model with the same layers by the same names, such as the float model that ``model`` was made from; a
            copy, since ``apply_octav`` works in place. It moves to the model's device.
        batches: as for ``calibrate_octav``; all are kept in memory. About 200 sequences are enough.
        ridge: above 0; a higher one stays closer to the present weights, as it should with fewer batches.
        progress_bar: whether to show one, where ``transformers.utils.logging`` allows it.

    Returns:
        For each layer, in that order, its relative squared error before, with the layers before it reconstructed, and
        after. A warning names the quantized linear layers that were left as they are: with a weight that is frozen,
        parametrized or another module's too, called several times in a pass, or not reached by the first batch.

    Raises:
        TypeError: ``model`` or ``teacher`` is not an ``nn.Module``, or ``batches`` or a batch has another type.
        ValueError: ``ridge`` is out of range; there is no batch; the model is not quantized, or packed, sharded or
            offloaded, or none of its layers can be reconstructed; the teacher lacks a layer, or its layer has another
            output or NaN. The model is then as it was.
    """
    check_quantized(model, "reconstruct")
    if not isinstance(teacher, nn.Module):
        raise TypeError(f"reconstruct takes a teacher that is an nn.Module, got {type(teacher).__name__}")
    if not isinstance(ridge, int | float) or isinstance(ridge, bool) or not 0 < ridge < math.inf:
        raise ValueError(f"reconstruct: ridge must be a finite number above 0, got {ridge!r}")
    student = uncompiled(model)
    kept, layers = _kept_batches(batches, student), _layers(student)
    left = _left(student, layers)
    layers = {name: layer for name, layer in layers.items() if name not in left}
    teachers = _teachers_layers(uncompiled(teacher), layers)
    device = device_of(student)
    if device is not None and device_of(teacher) != device:
        teacher.to(device)
    with (
        in_evaluation_mode(student),
        in_evaluation_mode(teacher),
        without_trace(model),
        without_trace(teacher) as target,
        _restored_after_error(layers.values()),
    ):
        groups, unreached = groups_by_input(student, layers, kept[0])
        left |= unreached
        errors: dict[str, LayerError] = {}
        for group in tqdm(groups, desc="reconstructing", disable=not progress_bar):
            sums = layer_sums(student, target, {name: (layers[name], teachers[name]) for name in group}, kept)
            errors |= {name: _improve(name, layers[name], sums[name], ridge) for name in group}
    if left:
        reasons = ", ".join(f"{name} ({reason})" for name, reason in left.items())
        logger.warning("%d linear layers were not reconstructed: %s", len(left), reasons)
    if not errors:
        raise ValueError(f"reconstruct: {type(student).__name__} has no layer that could be; the warning says why")
    return errors


def _kept_batches(batches: Any, model: nn.Module) -> list[Batch]:
    if isinstance(batches, Mapping | Tensor) or not isinstance(batches, Iterable):
        raise TypeError(
            f"reconstruct takes an iterable of batches, such as a DataLoader, got {type(batches).__name__}; write "
            "[batch] for a single batch"
        )
    kept: list[Batch] = []
    for number, batch in enumerate(batches, 1):
        check_batch(batch, f"reconstruct takes a list of batches, and each (here number {number}) is")
        kept.append(on_device(batch, device_of(model)))
    if not kept:
        raise ValueError("reconstruct got no batch, so there is nothing to learn from; pass at least one")
    return kept


def _layers(model: nn.Module) -> dict[str, Any]:
    """Full name -> quantized linear layer."""
    kind = type(model).__name__
    if is_packed(model):
        raise ValueError(f"reconstruct: {kind} is packed, and packed weights are fixed; call unpack_octav(model) first")
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, QuantizedLayer) and isinstance(module, nn.Linear | Conv1D)
    }
    if not layers:
        raise ValueError(f"reconstruct: {kind} has no quantized linear layer; only these can be reconstructed")
    for name, layer in layers.items():
        weight = own_parameters(layer).get("weight")
        if weight is not None and (weight.is_meta or sharded_shape(weight) is not None):
            raise ValueError(
                f"{name}: its weight of shape {tuple(sharded_shape(weight) or weight.shape)} is sharded or offloaded; "
                "reconstruct the whole model before"
            )
    return layers


def _left(model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, str]:
    """Full name -> why this layer keeps its weight."""
    shared, left = shared_weights(model), {}
    for name, layer in layers.items():
        parameters = own_parameters(layer)
        if parameters.get("weight") is None:
            left[name] = "its weight is parametrized"
        elif layer in shared:
            left[name] = "its weight is another module's too"
        elif not all(parameter is None or parameter.requires_grad for parameter in parameters.values()):
            left[name] = "it is frozen: requires_grad is False"
    return left


def _teachers_layers(teacher: nn.Module, layers: Iterable[str]) -> dict[str, nn.Module]:
    modules = dict(teacher.named_modules())
    missing = [name for name in layers if name not in modules]
    if missing:
        raise ValueError(
            f"{missing[0]}: the teacher {type(teacher).__name__} has no layer of this name; take the float model that "
            "the quantized one was made from"
        )
    return {name: modules[name] for name in layers}


@contextmanager
def _restored_after_error(layers: Iterable[nn.Module]) -> Iterator[None]:
    parameters = [parameter for layer in layers for parameter in layer.parameters(recurse=False)]
    before = [parameter.detach().clone() for parameter in parameters]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for parameter, values in zip(parameters, before, strict=True):
                parameter.copy_(values)
        raise


def _improve(name: str, layer: Any, sums: LeastSquares, ridge: float) -> LayerError:
    """Give ``layer`` the better of the present and the solved weight, and the bias that goes with it."""
    if not sums.rows or not sums.is_finite():
        problem = "hold NaN or Inf" if sums.rows else "are of padding only"
        raise ValueError(f"{name}: its inputs, or the outputs of the teacher's layer, {problem} in these batches")
    weight, bias = layer.weight, layer.bias

    def as_rows(weight: Tensor) -> Tensor:
        return weight.t() if isinstance(layer, Conv1D) else weight

    def quantized(weight: Tensor) -> Tensor:
        return as_rows(layer.weight_quantizer(weight)).double()

    def best_bias(weight: Tensor) -> Tensor | None:
        return None if bias is None else sums.best_bias(quantized(weight)).to(bias.dtype)

    def error(weight: Tensor, bias: Tensor | None) -> float:
        return sums.error(quantized(weight), None if bias is None else bias.double())

    solved = as_rows(sums.solve(as_rows(weight).double(), ridge, bias is not None).to(weight.dtype)).contiguous()
    before = error(weight, bias)
    after, weight_now, bias_now = min(
        ((error(each, best_bias(each)), each, best_bias(each)) for each in (weight, solved)), key=lambda found: found[0]
    )
    if after >= before:
        return LayerError(before, before)
    weight.copy_(weight_now)
    if bias is not None:
        bias.copy_(bias_now)
    return LayerError(before, after)
