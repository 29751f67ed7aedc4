"""``calibrate_octav`` and ``uncalibrate_octav``: static clips, and clips that follow the data again."""

from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from typing import Any, TypeVar

from torch import Tensor, nn

from .._utils.forward_pass import Batch, check_batch, device_of, in_evaluation_mode, on_device, run_batch, without_trace
from .._utils.progress import progress
from ..conversion.modules import activation_quantizers, layers_to_freeze
from ..conversion.record import check_quantized
from ..nn import PackedLayer
from .activations import Calibration, check_observer, warn_of_adapters
from .weights import frozen_weights

Model = TypeVar("Model", bound=nn.Module)


def calibrate_octav(
    model: Model,
    batches: Iterable[Batch] | None = None,
    *,
    observer: str = "mean",
    weights: bool = False,
    learned: bool = False,
    progress_bar: bool = True,
) -> Model:
    """Freeze the clips of activations by what ``batches`` show, those of ``weights`` as they are, or both.

    From then on, in training too, no statistics of them are computed. Both before training are the paper's static
    quantization (Appendix E.3). Called again, it freezes clips anew. Without ``batches`` activations, and without
    ``weights=True`` weights, stay as they are.

    **Activations** (layer inputs and attention operands). The model runs on each batch in evaluation mode, with dynamic
    clips of activations. With ``observer="mean"`` a frozen clip is the mean, in float64, of the dynamic clips of all
    calls on tensors that are not empty, as in the paper. With ``"histogram"`` it is the clip of the values of all calls
    together, bit for bit the same in whatever order and sizes they come: what the rule minimises is then minimal over
    the calibration data as a whole, to which a batch with large values contributes as much as they weigh. An attention
    operand has one clip for each matmul that it is in within one forward pass of its module: DeBERTa multiplies content
    and positions in turn. An activation that may be signed or unsigned gets the unsigned grid if no tensor had a
    negative value. With ``activation_granularity``, clips per attention head or channel are shared by all calls and
    batch elements (and heads, where a module merges them with the batch, as DeBERTa does). Tokens have no identity
    across batches, so an operand with a clip per token gets one for the whole tensor. A layer's input in groups has one
    for each group of channels, attention operands in groups are frozen without: the value per channel, the others per
    tensor.

    The histogram is for the clipping rules of ``sync_activation_clips``. It takes 30 to 150 kB for each clip. With
    ``asymmetric_activations`` the model runs twice on each batch, and the batches are kept for that: an offset, the
    lowest value of all, is not known before the last batch.

    **Learned clips.** With ``learned=True`` training goes on from the clips of activations that were found. Each is
    multiplied by ``exp(128 c)`` with a parameter c, ``<operand>_quantizer.clip_correction``, which begins at 0, so that
    the outputs are the same as without, and gets the gradient of LSQ (``functional.fake_quantize_learned_clip``); the
    gradients of inputs stay those of the config's estimator. c is a parameter of the model like any other: an optimizer
    that is made after this call trains it, state dicts and checkpoints have it, and weight decay draws the clip to what
    was calibrated. ``pack_octav`` and the exports store the learned clips as static ones under the names below.

    **Weights.** Embedding tables, whose rows are quantized when they are looked up, keep dynamic clips, and so do
    weights that several modules share, such as a head tied to the token embeddings; a warning names those.

    The clips are buffers of the quantizers, ``<module>.<operand>_quantizer.clips`` (on the unsigned grid
    ``.unsigned_clips``, with an ``.offset`` if it is asymmetric), ``[calls, *parts]``, and of weights
    ``[rows, 1, ...]`` or 0-dim; float32, or float64 where the data are, whatever dtype the model gets. So they are
    saved, loaded, copied and moved with the weights. Loading a state dict freezes the clips that it has, and makes
    those dynamic that it lacks. ``coverage_report`` shows what each operand has.

    Where several processes train one model, give each the same batches, or, with ``sync_activation_clips``, each its
    own batches, as many as the others; the clips are then equal in all processes.

    Args:
        model: one that ``apply_octav`` quantized, or that contains such a model, or a part of one. Its mode, buffers
            and the random state are restored.
        batches: any iterable, such as a DataLoader. Each batch is a mapping of the forward's keyword arguments, a tuple
            or list of positional ones, or a single tensor; its tensors are moved to the model's device. ``None``:
            activations are left as they are.
        observer: ``"mean"`` or ``"histogram"``; only with ``batches``.
        learned: whether the clips of activations are to be trained with the weights. Call it before the optimizer is
            made and before the model is wrapped for several processes. The model must not be packed or have adapters.
        weights: whether to freeze the clips of weights too. The model must then be neither packed nor sharded.
        progress_bar: whether to show one after two seconds, where ``transformers.utils.logging`` allows it.

    Returns:
        ``model``. Activations that no batch reached get dynamic clips, and a warning names them.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``, or ``batches`` or a batch has another type.
        ValueError: nothing is asked for; ``observer`` is unknown, or not for a clipping rule of the model; it or
            ``learned`` is given without batches, or the latter for a model that cannot learn clips; there is no batch
            or no quantized activation or weight; an attention module multiplied an operand more often in one forward
            pass than in another, or with another number of heads or channels; a weight holds NaN or Inf, or is packed
            or sharded. The model is then as it was.
    """
    if batches is None and not weights:
        raise ValueError(
            "calibrate_octav: nothing to freeze; pass batches for the clips of activations, weights=True for those of "
            "weights, or both"
        )
    if batches is not None and (isinstance(batches, Mapping | Tensor) or not isinstance(batches, Iterable)):
        raise TypeError(
            f"calibrate_octav takes an iterable of batches, such as a DataLoader, got {type(batches).__name__}; write "
            "[batch] for a single batch"
        )
    check_observer(observer)
    if batches is None and observer != "mean":
        raise ValueError(f"calibrate_octav: observer={observer!r} is for the clips of activations; pass batches too")
    if batches is None and learned:
        raise ValueError("calibrate_octav: learned=True is for the clips of activations; pass batches too")
    with frozen_weights(model) if weights else nullcontext():
        if batches is not None:
            _calibrate_activations(model, batches, observer, learned, progress_bar)
    if batches is None:
        warn_of_adapters(model)
    return model


def _calibrate_activations(
    model: nn.Module, batches: Iterable[Batch], observer: str, learned: bool, progress_bar: bool
) -> None:
    calibration = Calibration(model, observer, learned)
    if calibration.may_need_another_pass:
        batches = list(batches)  # in a second iteration a DataLoader may shuffle them anew
    _observe(calibration, model, batches, progress_bar)
    if calibration.needs_another_pass():
        _observe(calibration, model, batches, progress_bar)
    calibration.freeze()


def _observe(calibration: Calibration, model: nn.Module, batches: Iterable[Batch], progress_bar: bool) -> None:
    with calibration.observing(), in_evaluation_mode(model), without_trace(model) as runnable:
        device, number = device_of(model), 0
        for number, batch in enumerate(progress(batches, "calibrating") if progress_bar else batches, 1):
            check_batch(batch, f"calibrate_octav takes a list of batches, and each (here number {number}) is")
            run_batch(runnable, on_device(batch, device))
        if number == 0:
            raise ValueError(
                "calibrate_octav got no batch, so there is nothing to compute clips from; pass at least one"
            )


def uncalibrate_octav(model: Model, *, activations: bool = True, weights: bool = True) -> Model:
    """Undo ``calibrate_octav``, for activations, weights or both: clips follow the data again.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``.
        ValueError: the model is not quantized, or no such clip of it is frozen; or those of weights were, and it has
            been packed since.
    """
    check_quantized(model, "uncalibrate_octav")
    kind = type(model).__name__
    quantizers: list[Any] = []
    if activations:
        quantizers += [quantizer for _, _, quantizer in activation_quantizers(model)]
    if weights:
        packed = (module for module in model.modules() if isinstance(module, PackedLayer))
        if any(layer.weight_quantizer.is_frozen for layer in packed):
            raise ValueError(
                f"uncalibrate_octav: {kind} is packed, and frozen clips of its weights with it; write weights=False, "
                "or call unpack_octav(model) first"
            )
        quantizers += [layer.weight_quantizer for layer in layers_to_freeze(model).values()]
    frozen = [quantizer for quantizer in quantizers if quantizer.is_frozen]
    if not frozen:
        asked = [name for name, is_asked in (("activations", activations), ("weights", weights)) if is_asked]
        raise ValueError(f"uncalibrate_octav: no clip of {kind} is frozen (asked for: {' and '.join(asked) or 'none'})")
    for quantizer in frozen:
        quantizer.unfreeze()
    return model
