"""``suggestions``: the changes of the config that bring the model's outputs closest to the float model's."""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace

from torch import nn

from .._utils.forward_pass import Batch
from .._utils.progress import progress
from ..config import OctavConfig
from ..conversion.convert import apply_octav, remove_octav
from ..conversion.modules import activation_quantizers, layers_to_freeze
from ..conversion.record import recorded_config
from ..static_clips.calibrate import calibrate_octav
from .config_changes import changes, packed_bits, written
from .divergence import FloatOutputs
from .operand_statistics import OperandStatistics, operand_statistics
from .sensitivity import ModuleSensitivity

_MOST = 3  # suggestions
_LEAST_GAIN = 0.02  # share of the divergence; less may be chance
_LEAST_RISE = 1.0  # dB, of an operand that counts as improved


@dataclass(frozen=True)
class Suggestion:
    """A change of the config.

    Attributes:
        title: what to change.
        reason: what was measured: the divergence before and after, and the worst operand that improves.
        gain: share of the divergence from the float model that the change removes, at most 1.
        cost: in words and numbers.
        code: Python with the whole config, which quantizes the float model before it is trained again.
    """

    title: str
    reason: str
    gain: float
    cost: str
    code: str


def suggestions(
    model: nn.Module, outputs: FloatOutputs, sensitivities: Sequence[ModuleSensitivity]
) -> list[Suggestion]:
    """Measure changes of the config on copies of the model, and return those that gain most for their cost.

    For each change, a copy is quantized by the changed config, without training, and its divergence from the float
    model (``FloatOutputs``) is measured. Changes with the same requirement on the hardware (the same integer products;
    a scale for each token and channel; products of groups; more bits) compete, and the one with the highest
    ``gain / (1 + price)`` is kept. At most three are returned, in this order. The price is the cost as a number: the
    share of a training step, of the bytes of the weights, or of the modules that get 8 bits; products of
    groups, which ``convert_octav`` and the ONNX export do not support, add 0.25. Changes that remove less than 2 % of
    the divergence are left out. Static clips are calibrated again on the batches, also for the unchanged config.

    The copies are not trained, whereas a model trained with a config adapts to it: the ranking is by errors before
    training.

    Args:
        model: quantized by ``apply_octav``, before ``pack_octav``; it is not changed.
        outputs: those of the float model to compare with. Two batches of 16 sequences are enough to rank the changes.
        sensitivities: what ``sensitivity`` returned for this model, to choose the modules that may get 8 bits.

    Returns:
        Up to three, the best first; none if no change brings the model closer to the float model.
    """
    config = replace(recorded_config(model), frozen_weight_clips=False)
    base = _requantized(model, config, outputs.batches)
    before = outputs.divergence_of(base)
    if not before:
        return []
    statistics, stored = operand_statistics(base, outputs.batches), packed_bits(base)
    best: dict[str, tuple[float, Suggestion]] = {}  # what a change asks -> its score
    for change in progress(list(changes(base, config, sensitivities)), "measuring changes of the config"):
        changed = _requantized(model, change.config, outputs.batches)
        after = outputs.divergence_of(changed)
        gain = 1 - after / before
        more = packed_bits(changed) / stored - 1 if stored else 0.0
        score = gain / (1 + change.price + more)
        if gain >= _LEAST_GAIN and (change.asks not in best or score > best[change.asks][0]):
            reason = f"{outputs.measure}: {before:.3g} before and {after:.3g} after the change, on these batches"
            reason += _worst_improved(statistics, operand_statistics(changed, outputs.batches))
            cost = f"{change.cost}; packed weights: {more:+.1%} bytes" if more else change.cost
            best[change.asks] = score, Suggestion(change.title, reason, gain, cost, written(change.config))
    ranked = sorted(best.values(), key=lambda each: each[0], reverse=True)
    return [suggestion for _, suggestion in ranked[:_MOST]]


def _requantized(model: nn.Module, config: OctavConfig, batches: Sequence[Batch]) -> nn.Module:
    """A copy of the model quantized by ``config``, with static clips if the model has them."""
    weights = any(layer.weight_quantizer.is_frozen for layer in layers_to_freeze(model).values())
    activations = any(quantizer.is_frozen for _, _, quantizer in activation_quantizers(model))
    copy = apply_octav(remove_octav(deepcopy(model)), config)
    if weights or activations:
        calibrate_octav(copy, batches if activations else None, weights=weights)
    return copy


def _worst_improved(before: Sequence[OperandStatistics], after: Sequence[OperandStatistics]) -> str:
    """A sentence about the operand with the lowest SQNR among those that improve."""
    now = {(each.module, each.operand): each.sqnr_db for each in after}
    pairs = [(each, each.sqnr_db, now.get((each.module, each.operand))) for each in before]
    improved = [(old, new, each) for each, old, new in pairs if old and new and new - old >= _LEAST_RISE]
    if not improved:
        return "."
    old, new, worst = min(improved, key=lambda each: each[0])
    return f". The worst operand that improves: {worst.module} {worst.operand}, from {old:.1f} to {new:.1f} dB."
