"""``calibrate_octav`` and ``uncalibrate_octav``: make clips static, and dynamic again."""

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
    """Freeze the clips of activations at values computed from ``batches``, the current clips of ``weights``, or both.

    Frozen clips need no statistics, also in training. Freezing both before training gives the paper's static
    quantization (Appendix E.3). Another call freezes new clips. Without ``batches``, activations are unchanged; without
    ``weights=True``, weights are.

    **Activations** (layer inputs and attention operands). The model runs on each batch in evaluation mode, with dynamic
    clips of activations.

    - With ``observer="mean"``, as in the paper, a frozen clip is the mean, in float64, of the dynamic clips of all
      calls on tensors that are not empty. With ``"histogram"``, it is the clip of the values of all calls together, bit
      for bit the same whatever their order and the batch sizes. The rule then minimizes the error over the calibration
      data as a whole, where batches with large values count more.
    - An attention operand has one clip per matmul in one forward pass of its module; DeBERTa, for example, multiplies
      content and positions separately.
    - An activation that may be signed or unsigned gets the unsigned grid if no tensor had a negative value. An
      asymmetric grid begins at the lowest value of all calls; with ``"mean"``, it ends at the mean of their upper ends.
    - With ``activation_granularity``, all calls and samples share the clips per attention head or channel (and all
      heads do if the module merges them with the batch, as DeBERTa does). Tokens have no identity across batches, so an
      operand with a clip per token gets one clip for the whole tensor. A layer's input in groups has one clip per group
      of channels; of the attention operands in groups, the value gets one clip per channel, the others one per tensor.

    The histogram supports the clipping rules of ``sync_activation_clips`` and takes 30 to 150 kB per clip. With
    ``asymmetric_activations``, the model runs twice on each batch, and all batches are kept in memory, because the
    offset (the lowest value of all) is known only after the last batch.

    **Learned clips.** With ``learned=True``, training continues from the calibrated clips of activations. Each clip is
    multiplied by ``exp(128 c)`` with a parameter c, ``<operand>_quantizer.clip_correction``. It starts at 0, which does
    not change the outputs, and gets the gradient of LSQ (``functional.fake_quantize_learned_clip``); inputs keep the
    gradient estimator of the config. c is an ordinary parameter of the model: an optimizer created after this call
    trains it, state dicts and checkpoints contain it, and weight decay pulls the clip towards its calibrated value.
    ``pack_octav`` and the exports store learned clips as static clips.

    **Weights.** Embedding tables keep dynamic clips, because their rows are quantized when they are looked up. So do
    weights that several modules share, such as a head tied to the token embeddings, and weights that are all 0, which a
    frozen clip of 0 would keep from training; warnings name these.

    Clips are stored in buffers of the quantizers: ``<module>.<operand>_quantizer.clips`` (on the unsigned grid
    ``.unsigned_clips``, with an ``.offset`` if it is asymmetric), ``[calls, *parts]``, for weights ``[rows, 1, ...]``
    or ``[]``; float32, or float64 for float64 data, whatever the dtype of the model. They are saved, loaded, copied and
    moved with the weights. Loading a state dict freezes the clips that it contains and unfreezes the others.
    ``coverage_report`` shows which clips are frozen.

    If several processes train one model, pass all of them the same batches, or, with ``sync_activation_clips``, each of
    them the same number of its own batches; the clips are then equal in all processes.

    Args:
        model: quantized by ``apply_octav``, or containing such a model, or a part of one. Its mode, its buffers and the
            random state are restored.
        batches: any iterable, such as a DataLoader. Each batch is a mapping of the forward's keyword arguments, a tuple
            or list of positional arguments, or a single tensor; its tensors are moved to the model's device. ``None``
            leaves activations unchanged.
        observer: ``"mean"`` or ``"histogram"``; only with ``batches``.
        learned: whether to train the clips of activations with the weights. Call this before you create the optimizer
            and before you wrap the model for several processes. The model must not be packed or have adapters.
        weights: whether to freeze the clips of weights too. The model must not be packed or sharded.
        progress_bar: whether to show one after two seconds, if ``transformers.utils.logging`` allows it.

    Returns:
        ``model``. Activations that no batch reached get dynamic clips; a warning names them.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``, or ``batches`` or a batch has another type.
        ValueError: there is nothing to freeze; ``observer`` is unknown or does not support a clipping rule of the
            model; ``observer`` or ``learned`` is given without batches; the model cannot learn clips; there is no batch
            or no quantized activation or weight; the number of matmuls, heads or channels of an attention operand
            differs between forward passes; a weight holds NaN or Inf, or is packed or sharded. The model is then
            unchanged.
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
        raise ValueError(f"calibrate_octav: observer={observer!r} is for clips of activations; pass batches too")
    if batches is None and learned:
        raise ValueError("calibrate_octav: learned=True is for clips of activations; pass batches too")
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
        batches = list(batches)  # a DataLoader may shuffle differently in a second iteration
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
                "calibrate_octav got no batches, so there is nothing to compute clips from; pass at least one"
            )


def uncalibrate_octav(model: Model, *, activations: bool = True, weights: bool = True) -> Model:
    """Undo ``calibrate_octav`` for activations, weights or both: clips become dynamic again.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``.
        ValueError: the model is not quantized, or none of these clips is frozen; or weights with frozen clips have been
            packed.
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
                f"uncalibrate_octav: {kind} is packed, including the frozen clips of its weights; write weights=False, "
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
