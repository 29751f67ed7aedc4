"""``suggest_bits``: a width for each module, those that move the logits least under a budget."""

import copy
import glob
import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from typing import Any

from torch import Tensor, nn

from .._utils.forward_pass import Batch, check_batch, device_of, on_device
from .._utils.progress import progress
from .._utils.text_table import aligned
from ..conversion.record import check_quantized, is_packed
from ..conversion.request import Request
from ..functional.grid import MAX_BITS, MIN_BITS
from ..nn import FakeQuantize
from .knapsack import cheapest_errors
from .measure_tmp import Divergence, only
from .open_widths import Block, OpenWidths, Width, multiplications, with_bits

UNITS = ("bytes", "operations")


class BitSuggestion(dict[str, dict[str, Any]]):
    """A value for ``OctavConfig.module_overrides``. ``print`` shows a table of what was measured.

    Attributes:
        unit: ``"bytes"`` or ``"operations"``.
        cost: of the modules whose bits were chosen, in that unit.
        budget: the most that ``cost`` was allowed to be.
        divergence: of the logits from those of the float model, measured with the suggested bits; in the unit of
            ``analysis.sensitivity``.
        divergence_before: the same with the bits that the model has.
        sensitivity: full name of the module and field -> bits -> divergence with this operand quantized alone.
        chosen: full name of the module and field -> suggested bits.
    """

    def __init__(
        self,
        overrides: Mapping[str, dict[str, Any]],
        *,
        unit: str,
        cost: int,
        budget: int,
        divergence: float,
        divergence_before: float,
        sensitivity: Mapping[tuple[str, str], Mapping[int, float]],
        chosen: Mapping[tuple[str, str], int],
    ):
        super().__init__(overrides)
        self.unit = unit
        self.cost = cost
        self.budget = budget
        self.divergence = divergence
        self.divergence_before = divergence_before
        self.sensitivity = dict(sensitivity)
        self.chosen = dict(chosen)

    def __str__(self) -> str:
        bits = sorted({number for measured in self.sensitivity.values() for number in measured})
        rows = [("module", "field", "bits", *(f"alone at {number}" for number in bits))]
        for (module, field), number in self.chosen.items():
            measured = self.sensitivity[module, field]
            rows.append((module, field, str(number), *(f"{measured[each]:.3g}" for each in bits)))
        summary = (
            f"{self.cost:,} {self.unit} of at most {self.budget:,}; divergence of the logits from the float model "
            f"{self.divergence:.3g}, with the bits that the model has {self.divergence_before:.3g}"
        )
        return "\n".join([*aligned(rows), "", summary])


def suggest_bits(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    budget: float,
    unit: str = "bytes",
    bits: Sequence[int] = (2, 3, 4, 8),
    teacher: nn.Module | None = None,
) -> BitSuggestion:
    """Choose the bits of each module by what they do to the logits, under a budget of bytes or of operations.

    Each operand is quantized alone at each of ``bits``, all others in float, and the divergence of the logits from
    those of the float model measured (see ``analysis.sensitivity``). Of all choices within the budget the result is the
    one with the least sum of these, found exactly: an integer program, as in HAWQ-V3 (Yao et al. 2021). That
    divergences add up is an approximation; ``BitSuggestion.divergence`` is measured with all operands quantized.

    - ``unit="bytes"`` chooses bits of weights, whose cost is the bytes of their integers and scales in a packed
      checkpoint. Activations stay as they are.
    - ``unit="operations"`` chooses bits of weights, of layer inputs, and of the operands of each attention module. The
      cost is the bit operations of the forward passes of ``batches``: the sum over matmuls and convolutions of
      multiply-accumulates times the bits of both operands (BOPs; van Baalen et al. 2020, *Bayesian Bits*). An operand
      in float counts 32 bits.

    Bits that ``module_overrides`` or ``first_last_bits`` set, operands in float, and what the unit does not count (such
    as tied weights in bytes, which ``pack_octav`` leaves in float) stay as they are and are outside the budget. Tied
    weights get the same bits::

        apply_octav(model, config)
        overrides = suggest_bits(model, batches, budget=4)
        remove_octav(model)
        apply_octav(model, dataclasses.replace(config, module_overrides=overrides))

    Time: one forward pass of all batches for each operand and width. The model is left as it was.

    Args:
        model: one that ``apply_octav`` was called on, with dynamic clips, neither packed nor converted. The bits that
            it has do not matter.
        batches: as of ``calibrate_octav``; a few are enough.
        budget: a number of bits, such as 4 or 3.5: the modules together may take as much of ``unit`` as if all of their
            operands had this many bits; between whole numbers, linearly. From the lowest to the highest of ``bits``.
        unit: ``"bytes"`` or ``"operations"``.
        bits: the widths to choose from, 2 to 8.
        teacher: the float model to compare with. ``None``: ``model`` with all operands in float.

    Returns:
        ``module_overrides`` with the bits of each module by its full name, beside the overrides that the config has.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``, or ``batches`` or a batch has another type.
        ValueError: the model is not quantized by ``apply_octav``, packed, or has frozen clips; an argument is
            impossible; or nothing is left to choose.
    """
    check_quantized(model, "suggest_bits")
    request = _request_of(model)
    widths_allowed = _check_bits(bits)
    if unit not in UNITS:
        raise ValueError(f"suggest_bits: unit must be 'bytes' or 'operations', got {unit!r}")
    runs = _runs_of(model, batches)
    choosable = OpenWidths(request)
    found = choosable.of_bytes() if unit == "bytes" else choosable.of_operations(multiplications(model, runs))
    blocks = list(found)
    if not blocks:
        raise ValueError(
            f"suggest_bits: the config of {type(model).__name__} leaves no bits to choose for unit={unit!r}; set them "
            "by weight_bits and activation_bits rather than by module_overrides, which are kept"
        )
    limit = _limit(blocks, budget, widths_allowed, unit)
    divergence = Divergence(model, runs, teacher)
    before = divergence.of_model()
    widths = [width for block in blocks for width in block.widths]
    measured: dict[Width, dict[int, float]] = {}
    for width in progress(widths, "measuring sensitivity to bits"):
        with only(model, width.quantizers):
            measured[width] = {number: _at(divergence, [width], [number]) for number in widths_allowed}
    options = [list(product(widths_allowed, repeat=len(block.widths))) for block in blocks]
    costs = [[_cost(block, option) for option in its] for block, its in zip(blocks, options, strict=True)]
    errors = [
        [sum(measured[width][number] for width, number in zip(block.widths, option, strict=True)) for option in its]
        for block, its in zip(blocks, options, strict=True)
    ]
    best = cheapest_errors(costs, errors, limit)
    chosen = {
        width: number
        for block, its, index in zip(blocks, options, best, strict=True)
        for width, number in zip(block.widths, its[index], strict=True)
    }
    return BitSuggestion(
        _overrides(request, chosen),
        unit=unit,
        cost=sum(its[index] for its, index in zip(costs, best, strict=True)),
        budget=limit,
        divergence=_at(divergence, list(chosen), list(chosen.values())),
        divergence_before=before,
        sensitivity={setting: measured[width] for width in widths for setting in width.settings},
        chosen={setting: number for width, number in chosen.items() for setting in width.settings},
    )


def _request_of(model: nn.Module) -> Request:
    kind = type(model).__name__
    if is_packed(model):
        raise ValueError(f"suggest_bits: {kind} is packed, and its weights have their bits; call unpack_octav(model) first")
    frozen = [
        name
        for name, module in model.named_modules()
        if isinstance(module, FakeQuantize) and module.is_frozen
    ]
    if frozen:
        raise ValueError(
            f"suggest_bits: clips of {kind} are frozen, which are for the bits that they were computed for "
            f"({frozen[0]}, {len(frozen)} in all); call uncalibrate_octav(model) first, and calibrate_octav after "
            "apply_octav with the suggested bits"
        )
    config = model.__dict__.get("octav_config")
    if config is None:
        raise ValueError(f"suggest_bits: apply_octav was not called on this {kind} but on a model inside; pass that one")
    return Request.of(model, config)


def _check_bits(bits: Sequence[int]) -> list[int]:
    numbers = sorted(set(bits))
    if not numbers or not all(type(number) is int and MIN_BITS <= number <= MAX_BITS for number in numbers):
        raise ValueError(f"suggest_bits: bits must be integers from {MIN_BITS} to {MAX_BITS}, got {bits!r}")
    return numbers


def _runs_of(model: nn.Module, batches: Iterable[Batch]) -> list[Batch]:
    if isinstance(batches, Mapping | Tensor) or not isinstance(batches, Iterable):
        raise TypeError(
            f"suggest_bits takes an iterable of batches, such as a list, got {type(batches).__name__}; write [batch] "
            "for a single batch"
        )
    device, runs = device_of(model), []
    for number, batch in enumerate(batches, 1):
        check_batch(batch, f"suggest_bits takes a list of batches, and each (here number {number}) is")
        runs.append(on_device(batch, device))
    if not runs:
        raise ValueError("suggest_bits got no batch, so there is nothing to measure with; pass at least one")
    return runs


def _limit(blocks: Sequence[Block], budget: float, bits: Sequence[int], unit: str) -> int:
    """What the budget is in its unit."""
    if not isinstance(budget, int | float) or not bits[0] <= budget <= bits[-1]:
        lowest, highest = (sum(_cost(block, [end] * len(block.widths)) for block in blocks) for end in (bits[0], bits[-1]))
        raise ValueError(
            f"suggest_bits: budget is a number of bits from {bits[0]} ({lowest:,} {unit}) to {bits[-1]} ({highest:,} "
            f"{unit}), those to choose from; got {budget!r}"
        )
    low = math.floor(budget)
    below, above = (
        sum(_cost(block, [number] * len(block.widths)) for block in blocks) for number in (low, min(low + 1, MAX_BITS))
    )
    return below + math.floor((above - below) * (budget - low))


def _cost(block: Block, bits: Sequence[int]) -> int:
    with with_bits(block.widths, bits):
        return block.cost()


def _at(divergence: Divergence, widths: Sequence[Width], bits: Sequence[int]) -> float:
    with with_bits(widths, bits):
        return divergence.of_model()


def _overrides(request: Request, chosen: Mapping[Width, int]) -> dict[str, dict[str, Any]]:
    """The overrides of the config, and the chosen bits by exact names."""
    overrides = copy.deepcopy(request.config.module_overrides)
    for width, number in chosen.items():
        for name, field in width.settings:
            overrides.setdefault(glob.escape(name), {})[field] = number
    return overrides
