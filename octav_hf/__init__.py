"""Quantization-aware training with OCTAV clips for Transformers models: ``apply_octav(model, OctavConfig())``.

Importing the package registers the quantization method ``octav`` with Transformers, which loading a saved model needs.
"""

from . import export
from ._version import __version__
from .analysis.bit_allocation import BitSuggestion, suggest_bits
from .config import OctavConfig
from .conversion.convert import apply_octav, remove_octav
from .coverage.check import CoverageCheck, check_coverage
from .coverage.operand_watch import FloatOperand
from .coverage.report import CoverageReport, coverage_report
from .hub.model_card import model_card
from .hub.training_run import TrainingRun
from .inference.convert import convert_octav
from .integrations import OctavQuantizer
from .packing.pack import pack_octav, unpack_octav
from .static_clips.activations import calibrating
from .static_clips.calibrate import calibrate_octav, uncalibrate_octav
from .training.checkpoints import last_whole_checkpoint
from .training.distillation import distill
from .training.finite_clips import check_finite
from .training.reconstruction import LayerError, reconstruct

__all__ = [
    "BitSuggestion",
    "CoverageCheck",
    "CoverageReport",
    "FloatOperand",
    "LayerError",
    "OctavConfig",
    "OctavQuantizer",
    "TrainingRun",
    "__version__",
    "apply_octav",
    "calibrate_octav",
    "calibrating",
    "check_coverage",
    "check_finite",
    "convert_octav",
    "coverage_report",
    "distill",
    "export",
    "last_whole_checkpoint",
    "model_card",
    "pack_octav",
    "reconstruct",
    "remove_octav",
    "suggest_bits",
    "uncalibrate_octav",
    "unpack_octav",
]
