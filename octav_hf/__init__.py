"""Quantization-aware training with OCTAV clips for Transformers models: ``apply_octav(model, OctavConfig())``.

Importing the package registers the quantization method ``octav`` with Transformers, which loading a saved model needs.
"""

from ._version import __version__
from .config import OctavConfig
from .coverage import CoverageReport, coverage_report
from .integrations import OctavQuantizer
from .patching import apply_octav, remove_octav

__all__ = [
    "CoverageReport",
    "OctavConfig",
    "OctavQuantizer",
    "__version__",
    "apply_octav",
    "coverage_report",
    "remove_octav",
]
