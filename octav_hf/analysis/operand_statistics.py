"""``OperandStatisticsHooks`` and ``operand_statistics``: what quantization does to each operand."""

import math
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from .._utils.forward_pass import Batch, run_batches
from .._utils.torch_private import uncompiled
from ..conversion.modules import operand_quantizers
from ..functional.grid import integer_range
from ..nn import FakeQuantize, PackedWeight, WeightFakeQuantize
from ..nn.codes import Grid
from ..nn.function_modes import outside_function_modes
from .operand_sums import OperandSums, Sums, decibels, read
from .simulated import check_simulated
from .value_histogram import Histogram, ValueHistogram

_CLIPS_SHOWN = 2.5  # histograms show even bins up to this multiple of the median clip


@dataclass(frozen=True)
class OperandStatistics:
    """What quantization did to one operand ``x`` over all calls of its quantizer ``Q``.

    Attributes:
        module: full name; empty for the model itself.
        operand: ``"weight"``, ``"input"``, ``"query"``, ``"key"``, ``"probabilities"`` or ``"value"``.
        bits: of the grid.
        signed: whether the grid was signed; ``None`` if calls differed, or there was no call.
        asymmetric: whether the grid began at an offset below 0; ``None`` as for ``signed``.
        elements: number of quantized elements. A weight counts once, an embedding table by the rows looked up. 0 if no
            batch reached the operand; the following attributes are then ``None``.
        sqnr_db: ``10 log10(sum(x²) / sum((x - Q(x))²))``, the signal-to-quantization-noise ratio in dB; 6 dB more
            halve the error. ``inf`` without error; ``None`` for a tensor of zeros, and without a teacher for a packed
            weight, whose float values are gone.
        clipped_share: share of elements outside the clip, where the gradient is clipped too: ``|x| > s``, or
            ``x < 0`` or ``x > s`` on an unsigned grid, of ``x - offset`` on an asymmetric one.
        zero_share: share of the elements other than 0 that become 0; on an asymmetric grid, the level nearest to 0.
        clip, lowest_clip, highest_clip: mean, minimum and maximum of the clips over calls and over the parts with their
            own clip, such as channels, in units of ``x``.
        lowest, highest: minimum and maximum of ``x``.
        histogram, levels: histogram of the values, and levels of the grid with the median clip, sign and offset of all
            calls. ``None`` if not requested.
    """

    module: str
    operand: str
    bits: int
    signed: bool | None
    asymmetric: bool | None
    elements: int
    sqnr_db: float | None
    clipped_share: float | None
    zero_share: float | None
    clip: float | None
    lowest_clip: float | None
    highest_clip: float | None
    lowest: float | None
    highest: float | None
    histogram: Histogram | None = None
    levels: tuple[float, ...] | None = None


class OperandStatisticsHooks:
    """Context manager: while entered, collects statistics of every quantized operand, in training or evaluation.

    Sums are kept on the device; only ``result`` reads them. Outputs and gradients are bit-identical, except that
    compiled models run eagerly meanwhile. Clips are computed a second time. A weight is measured in its first call
    after entering, activations in all calls. Entering again adds to the same sums.

    Args:
        model: quantized by ``apply_octav``, or containing such a model; not one that multiplies integers.
        histograms: whether to measure histograms too.
        teacher: a float model with modules of the same names, to compare packed weights with.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``.
        ValueError: the model is not quantized, or ``convert_octav`` was called on it; or the teacher lacks a packed
            weight, or has it in another shape.
    """

    def __init__(self, model: nn.Module, histograms: bool = False, teacher: nn.Module | None = None):
        check_simulated(model, "operand_statistics")
        self._collectors: list[_Collector] = []
        for module, operand, quantizer in operand_quantizers(uncompiled(model)):
            collector = _Collector(module, operand, quantizer, histograms)
            if isinstance(quantizer, PackedWeight) and teacher is not None:
                weight = _weight_of(uncompiled(teacher), module, quantizer)
                collector.add(weight, quantizer.dequantize(), Grid(True, quantizer.compute_clip(weight)))
            self._collectors.append(collector)
        self._entered = ExitStack()

    def __enter__(self) -> "OperandStatisticsHooks":
        with ExitStack() as stack:
            stack.enter_context(torch.compiler.set_stance("force_eager"))  # hooks would trigger a recompilation
            for collector in self._collectors:
                stack.callback(collector.quantizer.register_forward_hook(collector.hook(), with_kwargs=True).remove)
            self._entered = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._entered.close()

    def result(self) -> list[OperandStatistics]:
        """The statistics of all operands, in the order of ``coverage_report``.

        Raises:
            ValueError: an operand held NaN or Inf.
        """
        sums = read([collector.sums for collector in self._collectors])
        return [collector.statistics(found) for collector, found in zip(self._collectors, sums, strict=True)]


def operand_statistics(
    model: nn.Module, batches: Iterable[Batch], histograms: bool = False, teacher: nn.Module | None = None
) -> list[OperandStatistics]:
    """The statistics of every quantized operand, in evaluation mode, in the order of ``coverage_report``.

    Args:
        model, histograms, teacher: as for ``OperandStatisticsHooks``. The model's mode, buffers and random state are
            restored.
        batches: as for ``calibrate_octav``.

    Raises:
        TypeError, ValueError: as for ``OperandStatisticsHooks`` and its ``result``; or there is no batch, or one is of
            another type.
    """
    hooks = OperandStatisticsHooks(model, histograms, teacher)
    with hooks:
        run_batches(model, batches, "operand_statistics", "measuring operands")
    return hooks.result()


class _Collector:
    """Collects the statistics of one operand."""

    def __init__(self, module: str, operand: str, quantizer: FakeQuantize, histograms: bool):
        self.module, self.operand, self.quantizer = module, operand, quantizer
        self.sums = OperandSums()
        self._histograms = histograms
        self._histogram: ValueHistogram | None = None
        self._grids: list[Tensor] = []  # median clip, offset and sign of each call, [3]

    def hook(self) -> Callable[..., None]:
        """A forward hook of the quantizer, which measures a weight once because it is the same in all calls."""
        calls = count()

        def add(quantizer: FakeQuantize, args: Any, kwargs: dict[str, Any], quantized: Tensor) -> None:
            if isinstance(quantizer, PackedWeight) or (isinstance(quantizer, WeightFakeQuantize) and next(calls)):
                return
            self.add_call(quantized, *args, **kwargs)

        return add

    @torch.no_grad()
    @outside_function_modes
    def add_call(self, quantized: Tensor, x: Tensor, call_index: int = 0, known: Any = None) -> None:
        """Add a call of the quantizer, which got the other arguments."""
        grid = self.quantizer.grid_of(x, call_index)  # also of an empty tensor: other ranks may wait for its clip
        if x.numel():
            self.add(x.detach(), quantized.detach(), grid)

    @torch.no_grad()
    def add(self, x: Tensor, quantized: Tensor, grid: Grid) -> None:
        self.sums.add(self.quantizer, x, quantized, grid)
        if self._histograms:
            self._histogram = self._histogram or ValueHistogram(x.device)
            self._histogram.add(x)
            parts = grid.clip.median(), 0.0 if grid.offset is None else grid.offset, grid.signed
            of_call = [torch.as_tensor(part, dtype=torch.float64, device=x.device) for part in parts]
            self._grids.append(torch.stack(of_call))

    def statistics(self, sums: Sums | None) -> OperandStatistics:
        quantizer, calls, elements = self.quantizer, self.sums.calls, self.sums.elements
        common = self.module, self.operand, quantizer.num_bits
        if sums is None:
            return OperandStatistics(*common, None, None, 0, *[None] * 8)
        if not math.isfinite(sums.signal):
            raise ValueError(
                f"{self.module} {self.operand}: the operand held NaN or Inf (or values whose squares overflow) in "
                f"{calls} calls with {elements} elements in all; call octav_hf.check_finite(model) after a step to "
                "find where they arise"
            )
        histogram = levels = None
        if self._histogram is not None:
            clip, offset, signed = torch.stack(self._grids).median(dim=0).values.tolist()
            low, high = integer_range(quantizer.num_bits, bool(signed))
            levels = tuple(offset + clip / (high + 1) * level for level in range(low, high + 1))
            lowest, highest = -sums.minus_lowest, sums.highest
            within = _CLIPS_SHOWN * clip or max(-lowest, highest) or 1.0
            histogram = self._histogram.read(lowest, highest, within)
        return OperandStatistics(
            *common,
            _if_equal(sums.signed_calls, calls),
            _if_equal(sums.asymmetric_calls, calls),
            elements,
            decibels(sums.signal, sums.noise),
            sums.clipped / elements,
            sums.zeroed / max(sums.nonzero, 1),
            sums.clip / self.sums.clips,
            -sums.minus_lowest_clip,
            sums.highest_clip,
            -sums.minus_lowest,
            sums.highest,
            histogram,
            levels,
        )


def _if_equal(number: float, calls: int) -> bool | None:
    """Whether something was true in all calls; ``None`` if only in some."""
    return bool(number) if number in (0, calls) else None


def _weight_of(teacher: nn.Module, module: str, packed: PackedWeight) -> Tensor:
    """The teacher's weight of a packed layer; ``ValueError`` if it has none of this shape."""
    weight = getattr(dict(teacher.named_modules()).get(module), "weight", None)
    if not isinstance(weight, Tensor) or weight.shape != packed.shape:
        found = "no such weight" if weight is None else f"one of shape {tuple(weight.shape)}"
        raise ValueError(
            f"{module}: its packed weight of shape {tuple(packed.shape)} is compared with the teacher's, but "
            f"{type(teacher).__name__} has {found}; pass the float model that training started from"
        )
    return weight.detach().to(packed.scale.device)
