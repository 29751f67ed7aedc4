"""Quantization-aware training with OCTAV clips for Transformers models: ``apply_octav(model, OctavConfig())``.

Importing the package registers the quantization method ``octav`` with Transformers, which loading a saved model needs.
"""

from ._version import __version__
from .config import OctavConfig
from .conversion.convert import apply_octav, remove_octav
from .coverage.check import CoverageCheck, check_coverage
from .coverage.operand_watch import FloatOperand
from .coverage.report import CoverageReport, coverage_report
from .hub.model_card import model_card
from .hub.training_run import TrainingRun
from .integrations import OctavQuantizer
from .packing.pack import pack_octav, unpack_octav
from .static_clips.activations import calibrate_octav, calibrating, uncalibrate_octav
from .static_clips.weights import freeze_weight_clips, unfreeze_weight_clips
from .training.checkpoints import last_whole_checkpoint
from .training.distillation import distill

__all__ = [
    "CoverageCheck",
    "CoverageReport",
    "FloatOperand",
    "OctavConfig",
    "OctavQuantizer",
    "TrainingRun",
    "__version__",
    "apply_octav",
    "calibrate_octav",
    "calibrating",
    "check_coverage",
    "coverage_report",
    "distill",
    "freeze_weight_clips",
    "last_whole_checkpoint",
    "model_card",
    "pack_octav",
    "remove_octav",
    "uncalibrate_octav",
    "unfreeze_weight_clips",
    "unpack_octav",
]
