"""The package's calls that differ between branches."""

from typing import Any

from torch import nn

import octav_hf


def calibrate(model: nn.Module, batches: list[Any] | None, weights: bool) -> None:
    if not hasattr(octav_hf, "freeze_weight_clips"):
        octav_hf.calibrate_octav(model, batches, weights=weights, progress_bar=False)
        return
    if weights:
        octav_hf.freeze_weight_clips(model)
    if batches is not None:
        octav_hf.calibrate_octav(model, batches, progress_bar=False)


def uncalibrate(model: nn.Module, activations: bool, weights: bool) -> None:
    if not hasattr(octav_hf, "freeze_weight_clips"):
        octav_hf.uncalibrate_octav(model, activations=activations, weights=weights)
        return
    if weights:
        octav_hf.unfreeze_weight_clips(model)
    if activations:
        octav_hf.uncalibrate_octav(model)
