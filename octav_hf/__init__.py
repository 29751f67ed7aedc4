"""Quantization-aware training with OCTAV clips for Transformers models: ``apply_octav(model, OctavConfig())``.

Importing the package registers the quantization method ``octav`` with Transformers, which loading a saved model needs.
"""

from ._version import __version__
from .calibration import calibrate_octav, calibrating, uncalibrate_octav
from .config import OctavConfig
from .coverage import CoverageReport, coverage_report
from .coverage_check import CoverageCheck, check_coverage
from .distillation import distill
from .integrations import OctavQuantizer, last_whole_checkpoint
from .model_card import model_card
from .operand_watch import FloatOperand
from .packing import pack_octav, unpack_octav
from .patching import apply_octav, remove_octav
from .training_run import TrainingRun
from .weight_clips import freeze_weight_clips, unfreeze_weight_clips

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
