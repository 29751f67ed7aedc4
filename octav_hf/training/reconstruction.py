"""Closed-form reconstruction: weights of linear layers that reproduce the teacher's outputs on quantized inputs."""

import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .._utils.forward_pass import Batch, check_batch, device_of, in_evaluation_mode, on_device, without_trace
from .._utils.progress import progress
from .._utils.sharded_weights import sharded_shape
from .._utils.torch_private import own_parameters, uncompiled
from ..conversion.modules import shared_weights
from ..conversion.record import check_quantized, is_packed
from ..nn import QuantizedLayer
from .layer_outputs import LayerOutputs
from .least_squares import LeastSquares
from .teacher import teacher_modules
from .token_rows import TokenRows

logger = logging.getLogger(__name__)


class LayerError(NamedTuple):
    """A layer's squared error against the teacher's outputs, divided by the sum of their squares."""

    before: float
    after: float


def reconstruct(
    model: nn.Module,
    teacher: nn.Module,
    batches: Iterable[Batch],
    *,
    ridge: float = 0.1,
    progress_bar: bool = True,
) -> dict[str, LayerError]:
    """Set the weights of quantized linear layers to those that best reproduce the teacher's outputs, without training.

    Layers are reconstructed one by one in the order in which they run. Let ``X`` be the layer's quantized inputs in the
    quantized model, with the layers before it already reconstructed, and ``Y`` the outputs of the teacher's layer of
    the same name, both ``[tokens, features]`` over all batches. With the current weight ``W``, the new weight is

        W* = (Yᵀ X + λ W)(Xᵀ X + λ I)⁻¹,   λ = ridge * mean(diag(Xᵀ X)),

    which minimizes ``‖Y - X W*ᵀ‖² + λ ‖W* - W‖²``. With a bias, the means of ``X`` and ``Y`` are subtracted first, and
    the new bias is the mean of ``Y - X Q(W*)ᵀ``. Because ``W*`` will be quantized, it is used only if its error after
    quantization is lower than that of ``W`` after quantization with its best bias. Padding marked by an attention mask
    is left out.

    Training can continue from here. Calibrate static clips of activations afterwards.

    Both models run each batch about twice in total, because a module whose layers are finished returns its stored
    output. This takes memory for one output per block and batch, and for one matrix ``Xᵀ X`` in float64.

    Args:
        model: quantized by ``apply_octav``; changed in place. Its mode, its buffers and the random state are restored.
        teacher: a model with the same layer names, such as a copy of the float model from before ``apply_octav``, which
            works in place. It is moved to the model's device.
        batches: as for ``calibrate_octav``; all are kept in memory. About 200 sequences are enough.
        ridge: above 0; a higher value stays closer to the current weights, as is better with fewer batches.
        progress_bar: whether to show one after two seconds, where ``transformers.utils.logging`` allows it.

    Returns:
        For each layer, in the order in which they run, its relative squared error before (with the layers before it
        reconstructed) and after. A warning names the quantized linear layers that were not changed: those whose weight
        is frozen, parametrized or shared, that are called several times in a pass, or that the first batch did not
        reach.

    Raises:
        TypeError: ``model`` or ``teacher`` is not an ``nn.Module``, or ``batches`` or a batch has another type.
        ValueError: ``ridge`` is out of range; there is no batch; the model is not quantized, or is packed, sharded or
            offloaded; no layer can be reconstructed; the teacher lacks a layer, or its layer has outputs of another
            shape or with NaN. The model is then unchanged.
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
    teachers = teacher_modules(uncompiled(teacher), layers, "reconstruct")
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
        tokens = TokenRows(student)
        with tokens.watching():
            ours = LayerOutputs(student, layers, kept)
        tokens.note(ours.calls)
        theirs = LayerOutputs(target, teachers, kept)
        groups, unreached = _groups(layers, ours.calls)
        left |= unreached
        for outputs in (ours, theirs):
            outputs.finish(unreached)
        errors: dict[str, LayerError] = {}
        for group in progress(groups, "reconstructing layers") if progress_bar else groups:
            for name, sums in _sums(ours, theirs, group, kept, tokens).items():
                errors[name] = _improve(name, layers[name], sums, ridge)
            for outputs in (ours, theirs):
                outputs.finish(group)
    if left:
        reasons = ", ".join(f"{name} ({reason})" for name, reason in left.items())
        logger.warning("%d linear layers were not reconstructed: %s", len(left), reasons)
    if not errors:
        raise ValueError(f"reconstruct: no layer of {type(student).__name__} can be reconstructed; see the warning")
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
        raise ValueError("reconstruct got no batches, so there is nothing to learn from; pass at least one")
    return kept


def _layers(model: nn.Module) -> dict[str, Any]:
    """Full name -> quantized linear layer."""
    kind = type(model).__name__
    if is_packed(model):
        raise ValueError(
            f"reconstruct: {kind} is packed, but packed weights cannot be changed; call unpack_octav(model) first"
        )
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
                "reconstruct the model before sharding or offloading it"
            )
    return layers


def _left(model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, str]:
    """Full name -> why the layer cannot be reconstructed."""
    shared, left = shared_weights(model), {}
    for name, layer in layers.items():
        parameters = own_parameters(layer)
        if parameters.get("weight") is None:
            left[name] = "its weight is parametrized"
        elif layer in shared:
            left[name] = "its weight is shared with another module"
        elif not all(parameter is None or parameter.requires_grad for parameter in parameters.values()):
            left[name] = "it is frozen: requires_grad is False"
    return left


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


def _groups(layers: Iterable[str], calls: Sequence[tuple[str, Tensor]]) -> tuple[list[list[str]], dict[str, str]]:
    """Names of layers in the order of their calls, grouped by common input; and why the other layers are left out."""
    names = [name for name, _ in calls]
    left = {name: "the first batch did not reach it" for name in layers if name not in names}
    left |= {name: "it was called several times" for name in layers if names.count(name) > 1}
    groups: list[list[str]] = []
    before = None
    for name, x in calls:
        if name in left:
            continue
        if x is before:
            groups[-1].append(name)
        else:
            groups.append([name])
        before = x
    return groups, left


def _sums(
    ours: LayerOutputs, theirs: LayerOutputs, group: Sequence[str], batches: Sequence[Batch], tokens: TokenRows
) -> dict[str, LeastSquares]:
    """The sums for each layer of a group, over the tokens of all batches."""
    found: dict[str, LeastSquares] = {}
    for number, batch in enumerate(batches):
        targets = theirs.take(number, group, lambda layer, x, output: _rows(output))
        inputs = ours.take(
            number, group, lambda layer, x, output: (_rows(layer.input_quantizer(x)), x.shape[:-1], output.shape[-1])
        )
        for name, (x, shape, width) in inputs.items():
            y = targets.get(name)
            if y is None or y.shape != (len(x), width):
                given = "was not called" if y is None else f"returned outputs of shape {tuple(y.shape)}"
                raise ValueError(
                    f"{name}: the teacher's layer {given}, but this one outputs of shape {(len(x), width)} (tokens, "
                    "features); use the float model from which the quantized model was made"
                )
            y, kept = y.to(x.device), tokens.kept(name, batch, shape)
            if kept is not None:
                x, y = x[kept.to(x.device)], y[kept.to(x.device)]
            if name not in found:
                found[name] = LeastSquares(x.shape[1], width, x.device)
            found[name].add(x, y)
    return found


def _rows(x: Tensor) -> Tensor:
    """A float64 copy of ``x``, ``[tokens, features]``."""
    return x.reshape(-1, x.shape[-1]).to(torch.float64, copy=True)


def _improve(name: str, layer: Any, sums: LeastSquares, ridge: float) -> LayerError:
    """Set ``layer`` to the better of the current and the solved weight, with its best bias."""
    if not sums.rows or not sums.is_finite():
        problem = "hold NaN or Inf" if sums.rows else "consist of padding only"
        raise ValueError(
            f"{name}: its inputs, or the outputs of the teacher's layer, {problem} in these batches; pass others"
        )
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
