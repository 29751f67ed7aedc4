"""``output_errors``: how far the output of each quantized module is from that in the float model."""

from collections import defaultdict
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .._utils.forward_pass import Batch, device_of, in_evaluation_mode, on_device, run_batch, run_batches
from .._utils.torch_private import tree_leaves, uncompiled
from ..nn import QuantizedAttention, QuantizedLayer
from ..training.teacher import teacher_modules
from .operand_sums import decibels, energy
from .simulated import check_has_float_weights, check_simulated
from .switching import in_float


@dataclass(frozen=True)
class OutputError:
    """The error of one module's output ``y`` over all batches, including that caused by the modules before it.

    Attributes:
        module: full name.
        kind: ``"linear"``, ``"convolution"``, ``"embedding"`` or ``"attention"``.
        sqnr_db: ``10 log10(sum(f²) / sum((y - f)²))`` in dB, where ``f`` is the output in the float model; for
            attention, the first output. ``inf`` without error; ``None`` if no batch reached the module, or ``f`` is 0.
    """

    module: str
    kind: str
    sqnr_db: float | None


def output_errors(model: nn.Module, batches: Iterable[Batch], teacher: nn.Module | None = None) -> list[OutputError]:
    """Compare the output of every quantized layer and attention module with the float model's on the same batches.

    The error of a layer's output comes from its own operands and from its input, so the errors show where in the model
    they arise and where they grow.

    Args:
        model: quantized by ``apply_octav``; packed only with a teacher. Mode, buffers and random state are restored.
        batches: as for ``calibrate_octav``. The outputs of all these modules are kept for one batch at a time.
        teacher: a float model with modules of the same names; ``None``: ``model`` with all its quantizers turned off.

    Returns:
        In the order of the model's modules.

    Raises:
        TypeError, ValueError: ``model`` or ``batches`` is none of these; or the teacher lacks a module, or it is called
            another number of times there, or returns another shape.
    """
    check_simulated(model, "output_errors")
    if teacher is None:
        check_has_float_weights(model, "output_errors")
    model, source = uncompiled(model), uncompiled(model if teacher is None else teacher)
    modules: dict[str, nn.Module] = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, QuantizedLayer | QuantizedAttention)
    }
    in_source = teacher_modules(source, modules, "output_errors")
    calls: dict[str, list[Tensor]] = defaultdict(list)
    sums: dict[str, Tensor] = {}  # signal and noise, [2] float64

    def keep(name: str, module: nn.Module, args: Any, output: Any) -> None:
        calls[name].append(next(leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)).detach())

    def compare(batch: Batch, _: Any) -> None:
        ours = dict(calls)
        calls.clear()
        with in_float(model) if teacher is None else in_evaluation_mode(source):
            run_batch(source, on_device(batch, device_of(source)))
        for name, outputs in ours.items():
            _check_shapes(name, outputs, calls[name])
            for output, target in zip(outputs, calls[name], strict=True):
                target = target.to(output.device)
                found = torch.stack([energy(target), energy(output.to(target.dtype) - target)])
                sums[name] = sums[name] + found if name in sums else found
        calls.clear()

    with ExitStack() as stack:
        for each in [modules] if source is model else [modules, in_source]:
            for name, module in each.items():
                stack.callback(module.register_forward_hook(partial(keep, name)).remove)
        run_batches(model, batches, "output_errors", "comparing layers", compare)
    return [
        OutputError(name, _kind(module), decibels(*sums[name].tolist()) if name in sums else None)
        for name, module in modules.items()
    ]


def _kind(module: nn.Module) -> str:
    return module.kind if isinstance(module, QuantizedLayer) else "attention"


def _check_shapes(name: str, outputs: list[Tensor], targets: list[Tensor]) -> None:
    ours, theirs = ([tuple(x.shape) for x in each] for each in (outputs, targets))
    if ours != theirs:
        raise ValueError(
            f"output_errors: {name} returned tensors of shapes {ours}, and in the float model {theirs}; pass a teacher "
            "of the same architecture"
        )
