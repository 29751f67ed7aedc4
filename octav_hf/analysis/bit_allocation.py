"""``suggest_bits``: the bits of each module that change the outputs least within a budget."""

import copy
import glob
import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from typing import Any

from torch import nn

from .._utils.forward_pass import Batch
from .._utils.progress import progress
from .._utils.text_table import aligned
from ..conversion.request import Request
from ..functional.grid import MAX_BITS, MIN_BITS
from ..nn import FakeQuantize
from .divergence import FloatOutputs
from .knapsack import cheapest_errors
from .open_widths import Block, OpenWidths, Width, multiplications, with_bits
from .simulated import check_has_float_weights
from .switching import in_float

UNITS = ("bytes", "operations")


class BitSuggestion(dict[str, dict[str, Any]]):
    """A value for ``OctavConfig.module_overrides``. ``print`` shows a table of what was measured.

    Attributes:
        unit: ``"bytes"`` or ``"operations"``.
        cost: of the modules whose bits were chosen, in that unit.
        budget: upper limit of ``cost``.
        divergence: of the outputs from those of the float model, measured with the suggested bits; see
            ``analysis.divergence``.
        divergence_before: the same with the model's current bits.
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
            f"{self.cost:,} {self.unit} of at most {self.budget:,}; divergence of the outputs from the float model "
            f"{self.divergence:.3g}, with the model's current bits {self.divergence_before:.3g}"
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
    """Choose the bits of each module by their effect on the outputs, within a budget of bytes or operations.

    Each operand is quantized to each of ``bits`` with all others in float, and the divergence of the outputs from those
    of the float model is measured (see ``analysis.divergence``). The result is the choice within the budget with the
    smallest sum of divergences: the exact solution of an integer program, as in HAWQ-V3 (Yao et al. 2021). That
    divergences add up is an approximation; ``BitSuggestion.divergence`` is measured with all operands quantized.

    - ``unit="bytes"`` chooses bits of weights, whose cost is the bytes of their integers and scales in a packed
      checkpoint. Activations stay as they are.
    - ``unit="operations"`` chooses bits of weights, of layer inputs, and of the operands of each attention module. The
      cost is the bit operations of the forward passes of ``batches``: the sum over matmuls and convolutions of
      multiply-accumulates times the bits of both operands (BOPs; van Baalen et al. 2020, *Bayesian Bits*). An operand
      in float counts 32 bits.

    Bits set by ``module_overrides`` or ``first_last_bits``, operands in float, and operands that the unit does not
    count (such as tied weights in bytes, which ``pack_octav`` leaves in float) stay unchanged, outside the budget. Tied
    weights get the same bits::

        apply_octav(model, config)
        overrides = suggest_bits(model, batches, budget=4)
        remove_octav(model)
        apply_octav(model, dataclasses.replace(config, module_overrides=overrides))

    This takes one forward pass on all batches for each operand and number of bits. The model is not changed.

    Args:
        model: one that ``apply_octav`` was called on, with dynamic clips, neither packed nor converted. Its current
            bits do not matter.
        batches: as for ``calibrate_octav``; a few are enough.
        budget: a number of bits, such as 4 or 3.5, between the lowest and the highest of ``bits``. The limit is the
            cost if all operands had this number of bits, interpolated linearly between whole numbers.
        unit: ``"bytes"`` or ``"operations"``.
        bits: the numbers of bits to choose from, 2 to 8.
        teacher: the float model to compare with. ``None``: ``model`` with all operands in float.

    Returns:
        ``module_overrides`` with the bits of each module by its full name, and with the config's own overrides.

    Raises:
        TypeError: ``model`` or ``teacher`` is not an ``nn.Module``, or ``batches`` or a batch has another type.
        ValueError: the model is not quantized by ``apply_octav``, is packed, or has frozen clips; the teacher is
            quantized; an argument is out of range; or there are no bits to choose.
    """
    check_has_float_weights(model, "suggest_bits")
    request = _request_of(model)
    widths_allowed = _check_bits(bits)
    if unit not in UNITS:
        raise ValueError(f"suggest_bits: unit must be 'bytes' or 'operations', got {unit!r}")
    outputs = FloatOutputs(model, batches, teacher, "suggest_bits")
    choosable = OpenWidths(request)
    found = (
        choosable.of_bytes() if unit == "bytes" else choosable.of_operations(multiplications(model, outputs.batches))
    )
    blocks = list(found)
    if not blocks:
        raise ValueError(
            f"suggest_bits: the config of {type(model).__name__} leaves no bits to choose for unit={unit!r}; set them "
            "by weight_bits and activation_bits rather than by module_overrides, which are kept"
        )
    limit = _limit(blocks, budget, widths_allowed, unit)
    before = outputs.divergence_of(model)
    widths = [width for block in blocks for width in block.widths]
    measured: dict[Width, dict[int, float]] = {}

    def divergence_at(widths: Iterable[Width], bits: Iterable[int]) -> float:
        with with_bits(widths, bits):
            return outputs.divergence_of(model)

    for width in progress(widths, "measuring sensitivity to bits"):
        with in_float(model, but=width.quantizers):
            measured[width] = {number: divergence_at([width], [number]) for number in widths_allowed}
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
        divergence=divergence_at(chosen.keys(), chosen.values()),
        divergence_before=before,
        sensitivity={setting: measured[width] for width in widths for setting in width.settings},
        chosen={setting: number for width, number in chosen.items() for setting in width.settings},
    )


def _request_of(model: nn.Module) -> Request:
    kind = type(model).__name__
    frozen = [name for name, module in model.named_modules() if isinstance(module, FakeQuantize) and module.is_frozen]
    if frozen:
        raise ValueError(
            f"suggest_bits: clips of {kind} are frozen and fit only the bits that they were computed for "
            f"({frozen[0]}, {len(frozen)} in all); call uncalibrate_octav(model) first, and calibrate_octav after "
            "apply_octav with the suggested bits"
        )
    config = model.__dict__.get("octav_config")
    if config is None:
        raise ValueError(
            f"suggest_bits: apply_octav was not called on this {kind} but on a model inside; pass that one"
        )
    return Request.of(model, config)


def _check_bits(bits: Sequence[int]) -> list[int]:
    numbers = sorted(set(bits))
    if not numbers or not all(type(number) is int and MIN_BITS <= number <= MAX_BITS for number in numbers):
        raise ValueError(f"suggest_bits: bits must be integers from {MIN_BITS} to {MAX_BITS}, got {bits!r}")
    return numbers


def _limit(blocks: Sequence[Block], budget: float, bits: Sequence[int], unit: str) -> int:
    """The budget in its unit."""
    if not isinstance(budget, int | float) or not bits[0] <= budget <= bits[-1]:
        lowest, highest = (
            sum(_cost(block, [end] * len(block.widths)) for block in blocks) for end in (bits[0], bits[-1])
        )
        raise ValueError(
            f"suggest_bits: budget must be a number of bits from {bits[0]} ({lowest:,} {unit}) to {bits[-1]} "
            f"({highest:,} {unit}), the lowest and the highest of bits; got {budget!r}"
        )
    low = math.floor(budget)
    below, above = (
        sum(_cost(block, [number] * len(block.widths)) for block in blocks) for number in (low, min(low + 1, MAX_BITS))
    )
    return below + math.floor((above - below) * (budget - low))


def _cost(block: Block, bits: Sequence[int]) -> int:
    with with_bits(block.widths, bits):
        return block.cost()


def _overrides(request: Request, chosen: Mapping[Width, int]) -> dict[str, dict[str, Any]]:
    """The overrides of the config, with the chosen bits added under exact names."""
    overrides = copy.deepcopy(request.config.module_overrides)
    for width, number in chosen.items():
        for name, field in width.settings:
            overrides.setdefault(glob.escape(name), {})[field] = number
    return overrides
