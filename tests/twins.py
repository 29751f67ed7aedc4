"""Slow, obvious float64 references ("twins") for octav_hf.functional.

Everything here is written from the paper alone (Sakr et al., ICML 2022, arXiv 2206.06501) in float64 NumPy, without a
look at octav_hf, and nothing here imports it. Equation numbers are the paper's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import torch

Array = np.ndarray


def as_float64(x: Any) -> Array:
    """`x` (tensor of any dtype, array, list or number) as a float64 array holding exactly the same values."""
    if isinstance(x, torch.Tensor):
        return x.detach().cpu().to(torch.float64).numpy()
    return np.asarray(x, dtype=np.float64)


# --------------------------------------------------------------------------------------------------------------------
# the grid
# --------------------------------------------------------------------------------------------------------------------


def grid_twin(clip: Any, num_bits: int, signed: bool = True) -> tuple[Array, int, int]:
    """Step, smallest and largest integer of the two's-complement grid (Eq. 2, 3; footnote 2).

    Signed: step s/2^(B-1), integers [-2^(B-1), 2^(B-1)-1]. Unsigned: step s/2^B, integers [0, 2^B-1].
    """
    s = as_float64(clip)
    if signed:
        half = 2 ** (num_bits - 1)
        return s / half, -half, half - 1
    return s / 2**num_bits, 0, 2**num_bits - 1


def quantize_twin(x: Any, clip: Any, num_bits: int, signed: bool = True) -> Array:
    """Eq. 2 (signed) and Eq. 3 (unsigned) on the two's-complement grid, rounding half to even; a zero clip gives zeros.

    `clip` is a number, or an array that broadcasts against `x` (one clip per row: shape [rows, 1]).
    """
    x = as_float64(x)
    step, low, high = grid_twin(clip, num_bits, signed)
    step = np.broadcast_to(step, x.shape)
    nonzero = step > 0
    integers = np.clip(np.round(x / np.where(nonzero, step, 1.0)), low, high)  # np.round rounds half to even
    return np.where(nonzero, integers * step, 0.0)


def midpoint_distance_twin(x: Any, clip: Any, num_bits: int, signed: bool = True) -> Array:
    """How far, in steps, each element lies from the nearest point at which its quantized value (Eq. 2, 3) changes.

    An element for which this is smaller than another computation's rounding error may honestly come out one step away.
    """
    x = as_float64(x)
    step, low, high = grid_twin(clip, num_bits, signed)
    step = np.broadcast_to(step, x.shape)
    v = np.where(step > 0, x / np.where(step > 0, step, 1.0), 0.0)
    nearest_change = np.clip(np.floor(v) + 0.5, low + 0.5, high - 0.5)
    return np.where(step > 0, np.abs(v - nearest_change), 0.5)


def mse_twin(x: Any, clip: float, num_bits: int, signed: bool = True) -> float:
    """Measured mean squared error of the two's-complement quantizer of Eq. 2, 3 with one clip; 0 if x is empty."""
    x = as_float64(x).ravel()
    return float(np.mean((quantize_twin(x, clip, num_bits, signed) - x) ** 2)) if x.size else 0.0


# --------------------------------------------------------------------------------------------------------------------
# clips
# --------------------------------------------------------------------------------------------------------------------


def octav_magnitudes(x: Any, signed: bool = True) -> Array:
    """The magnitudes the sums of Eq. 6 run over, exact zeros left out.

    Unsigned: the grid takes every negative value to zero whatever the clip is, so a negative counts as an exact zero.
    """
    x = as_float64(x).ravel()
    magnitudes = np.abs(x) if signed else np.maximum(x, 0.0)
    return magnitudes[magnitudes > 0]


def octav_noise_factor(num_bits: int, signed: bool = True) -> float:
    """The factor of P(|X| <= s) s^2 in Eq. 4: 4^-B/3 signed, 4^-B/12 unsigned."""
    return 4.0**-num_bits / (3.0 if signed else 12.0)


def octav_update(magnitudes: Array, s: float, factor: float) -> float:
    """One update of Eq. 6; `s` itself when no magnitude exceeds it (the equation's numerator would be 0)."""
    outside = magnitudes > s
    if not outside.any():
        return s
    inside = magnitudes <= s
    return float(magnitudes[outside].sum() / (factor * inside.sum() + outside.sum()))


def octav_iterates(x: Any, num_bits: int, signed: bool = True, updates: int = 100) -> list[float]:
    """s_1, s_2, ... s_{updates+1} of Eq. 6, the raw recursion (Appendix A) and nothing else."""
    magnitudes = octav_magnitudes(x, signed)
    factor = octav_noise_factor(num_bits, signed)
    iterates = [float(magnitudes.sum() / magnitudes.size)]
    for _ in range(updates):
        iterates.append(octav_update(magnitudes, iterates[-1], factor))
    return iterates


def octav_root_twin(x: Any, num_bits: int, signed: bool = True) -> float:
    """The sign change of h(s) = c s N_in(s) - sum_{|x|>s} (|x| - s), by bisection.

    h is half the derivative of Eq. 4, times N. It increases strictly in s (its jumps at the data's magnitudes go up),
    so the sign change is unique, and a fixed point of Eq. 6 is a zero of h.
    """
    magnitudes = octav_magnitudes(x, signed)
    factor = octav_noise_factor(num_bits, signed)
    low, high = 0.0, float(magnitudes.max())
    while True:
        middle = 0.5 * (low + high)
        if not low < middle < high:
            return high
        outside = magnitudes[magnitudes > middle]
        h = factor * middle * (magnitudes.size - outside.size) - (outside - middle).sum()
        low, high = (middle, high) if h < 0 else (low, middle)


def octav_clip_twin(x: Any, num_bits: int, signed: bool = True, max_iterations: int | None = None) -> float:
    """OCTAV's clip of one flat tensor: Eq. 6 literally, from s_1 = sum|x| / #{|x|>0} (Appendix A).

    max_iterations=k: k updates applied to s_1. None: until |s_new - s| <= 1e-12 s; where the recursion runs in a cycle,
    about a magnitude that many elements share, the sign change of `octav_root_twin`. All-zero or empty: 0.
    """
    magnitudes = octav_magnitudes(x, signed)
    if magnitudes.size == 0:
        return 0.0
    factor = octav_noise_factor(num_bits, signed)
    s = float(magnitudes.sum() / magnitudes.size)
    if max_iterations is not None:
        for _ in range(max_iterations):
            s = octav_update(magnitudes, s, factor)
        return s
    before: float | None = None
    for _ in range(1000):
        s_new = octav_update(magnitudes, s, factor)
        if abs(s_new - s) <= 1e-12 * s:
            return s_new
        if s_new == before:
            break
        before, s = s, s_new
    return octav_root_twin(x, num_bits, signed)


def max_clip_twin(x: Any, signed: bool = True) -> float:
    """Max-scaling: s = max|x| (text under Eq. 3); unsigned: the largest value, negatives counting as zero."""
    x = as_float64(x).ravel()
    magnitudes = np.abs(x) if signed else np.maximum(x, 0.0)
    return float(magnitudes.max()) if magnitudes.size else 0.0


def percentile_clip_twin(x: Any, percentile: float, signed: bool = True) -> float:
    """The percentile rule of Table 5: nearest rank (inverted CDF) of |x| over all elements, zeros included.

    Rank ceil(percentile / 100 * n) in exact decimal arithmetic. numpy.percentile(method="inverted_cdf") says the same
    except where its float arithmetic tips: 99.9 % of 1000 elements is rank 999, and it takes the 1000th.
    """
    x = np.sort(np.abs(as_float64(x)).ravel() if signed else np.maximum(as_float64(x), 0.0).ravel())
    if not x.size:
        return 0.0
    return float(x[max(1, math.ceil(Fraction(str(percentile)) / 100 * x.size)) - 1])


def mse_sweep_clip_twin(x: Any, num_bits: int, signed: bool = True, points: int = 100) -> float:
    """The MSE sweep of Appendix E.2: k/100 of max|x|, k = 1..100, the first of the smallest measured error."""
    largest = max_clip_twin(x, signed)
    clips = [k / points * largest for k in range(1, points + 1)]
    errors = [mse_twin(x, clip, num_bits, signed) for clip in clips]
    return clips[int(np.argmin(errors))]


def best_sweep_mse(x: Any, num_bits: int, signed: bool = True, points: int = 1000) -> float:
    """Lowest measured MSE of the quantizer of Eq. 2, 3 over the clips k/points of max|x|, k = 1..points.

    The same number as min(mse_twin(x, clip, ...)) over those clips (a test compares them), but a million samples are
    sorted once, so that each clip costs a search for its 2^B - 1 cell borders: within a cell of value q the squared
    error is sum(x^2) - 2 q sum(x) + q^2 n, and each sum is a difference of two running sums.
    """
    x = np.sort(as_float64(x).ravel())
    sums = np.concatenate([[0.0], np.cumsum(x)])
    squares = np.concatenate([[0.0], np.cumsum(x * x)])
    largest = max_clip_twin(x, signed)
    best = np.inf
    for k in range(1, points + 1):
        step, low, high = grid_twin(k / points * largest, num_bits, signed)
        integers = np.arange(low, high + 1)
        borders = np.searchsorted(x, (integers[:-1] + 0.5) * step)
        edges = np.concatenate([[0], borders, [x.size]])
        q = integers * step
        error = np.diff(squares[edges]) - 2 * q * np.diff(sums[edges]) + q * q * np.diff(edges)
        best = min(best, float(error.sum()) / x.size)
    return best


# --------------------------------------------------------------------------------------------------------------------
# gradients
# --------------------------------------------------------------------------------------------------------------------


def gradient_twin(x: Any, clip: Any, signed: bool = True, gradient: str = "mad") -> Array:
    """dQ/dx as the estimators of section 4 define it: "ste", "pwl" or "mad" (Eq. 10).

    ste: 1 everywhere. pwl: 1 inside the clip, else 0. mad: 1 inside, else s/|x|, the attenuation a of clip(x) = a x.
    Inside is |x| <= s signed, 0 <= x <= s unsigned; an unsigned grid takes x < 0 to 0 = 0 x, so a is 0 there.
    """
    x = as_float64(x)
    s = np.broadcast_to(as_float64(clip), x.shape)
    if gradient == "ste":
        return np.ones_like(x)
    magnitude = np.abs(x)
    inside = (magnitude <= s) if signed else ((x >= 0) & (x <= s))
    if gradient == "pwl":
        return np.where(inside, 1.0, 0.0)
    if gradient == "mad":
        attenuation = np.where(inside, 1.0, s / np.where(magnitude > 0, magnitude, 1.0))
        return attenuation if signed else np.where(x < 0, 0.0, attenuation)
    raise ValueError(f"gradient_twin: gradient={gradient!r} is none of ste, pwl, mad")


def mad_surrogate(x: torch.Tensor, clip: torch.Tensor, signed: bool = True) -> torch.Tensor:
    """A function whose true derivative in x is MAD's (Eq. 10), so that gradcheck can judge it.

    x inside the clip, s sign(x) (1 + ln(|x|/s)) outside: continuous at |x| = s, derivative s/|x| beyond. Unsigned: 0
    for x < 0. Float64, autograd's own derivative; `clip` positive, held constant.
    """
    s = clip.detach()
    magnitude = x.abs()
    ratio = torch.where(magnitude > s, magnitude / s, torch.ones_like(x))
    y = torch.where(magnitude > s, s * torch.sign(x) * (1 + torch.log(ratio)), x)
    return y if signed else torch.where(x < 0, torch.zeros_like(y), y)


# --------------------------------------------------------------------------------------------------------------------
# data
# --------------------------------------------------------------------------------------------------------------------

FAMILIES: Sequence[str] = ("gaussian", "laplace", "student_t3", "relu_gaussian")


def samples(family: str, size: int, seed: int) -> Array:
    """`size` samples, float32 values: N(0, 1), Laplace(0, 1), Student-t with 3 degrees of freedom, max(0, N(0, 1))."""
    rng = np.random.default_rng(seed)
    draw = {
        "gaussian": lambda: rng.standard_normal(size),
        "laplace": lambda: rng.laplace(size=size),
        "student_t3": lambda: rng.standard_t(3, size=size),
        "relu_gaussian": lambda: np.maximum(rng.standard_normal(size), 0.0),
    }[family]
    return draw().astype(np.float32)
