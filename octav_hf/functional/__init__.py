"""Clipping rules, grids and fake quantization as functions of tensors. Depends only on torch."""

from .error import quantization_error
from .fake_quantize import GradientEstimator, fake_quantize
from .grid import integer_range, round_to_grid, step_size
from .kernels import cpu, cuda
from .kernels.operations import use_kernels
from .learned_clip import fake_quantize_learned_clip
from .max_scaling import max_clip
from .mse import mse_clip
from .mse_sweep import mse_sweep_clip
from .octav import octav_clip
from .percentile import percentile_clip
from .registry import CLIP_RULES, register_clip_rule

__all__ = [
    "CLIP_RULES",
    "GradientEstimator",
    "fake_quantize",
    "fake_quantize_learned_clip",
    "integer_range",
    "max_clip",
    "mse_clip",
    "mse_sweep_clip",
    "octav_clip",
    "percentile_clip",
    "quantization_error",
    "register_clip_rule",
    "round_to_grid",
    "step_size",
]

use_kernels("cpu", cpu)
use_kernels("cuda", cuda)
