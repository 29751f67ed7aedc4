"""Quantization-aware training with OCTAV clips for Transformers models: ``apply_octav(model, OctavConfig())``.

Importing the package registers the quantization method ``octav`` with Transformers, which loading a saved model needs.
"""

from ._version import __version__
from .config import OctavConfig
from .coverage import CoverageReport, coverage_report
from .coverage_check import CoverageCheck, check_coverage
from .integrations import OctavQuantizer, last_whole_checkpoint
from .operand_watch import FloatOperand
from .packing import pack_octav, unpack_octav
from .patching import apply_octav, remove_octav

__all__ = [
    "CoverageCheck",
    "CoverageReport",
    "FloatOperand",
    "OctavConfig",
    "OctavQuantizer",
    "__version__",
    "apply_octav",
    "check_coverage",
    "coverage_report",
    "last_whole_checkpoint",
    "pack_octav",
    "remove_octav",
    "unpack_octav",
]
