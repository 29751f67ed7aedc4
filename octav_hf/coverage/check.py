"""The coverage check: a forward pass that finds matmuls with operands in floating point."""

from collections.abc import Iterable

from torch import nn

from .._utils.forward_pass import Batch, check_batch, run_batch, without_trace
from .._utils.text_table import aligned
from ..nn import ATTENTION_OPERANDS
from .operand_watch import MATMULS, FloatOperand, OperandWatch
from .report import CoverageReport, Operand


class CoverageCheck(list[FloatOperand]):
    """The operands in float; empty if every operand of every matmul was quantized. ``print`` shows a table.

    Attributes:
        matmuls: number of matmuls and convolutions that ran, quantized or not.
        quantized_matmuls: number of those without an operand in float.
        description: what the listed operands have in common, for the table.
    """

    def __init__(
        self, rows: Iterable[FloatOperand], matmuls: int, quantized_matmuls: int, description: str = "in float"
    ):
        super().__init__(rows)
        self.matmuls = matmuls
        self.quantized_matmuls = quantized_matmuls
        self.description = description

    def unexplained(self, report: CoverageReport) -> "CoverageCheck":
        """The operands that ``coverage_report`` of the same model does not list as left in float.

        An operand belongs to the innermost enclosing module that the report lists as a layer or attention module. If
        the report lists a weight of it in float, weights are explained; if it lists an input in float, inputs are. For
        other modules, a parameter in float explains operands of this module, but not of modules inside. Where a module
        reads the weight of a quantized layer and does not call the layer, the operands belong to that layer.
        """
        listed: dict[str, list[Operand]] = {}
        for operand in report:
            listed.setdefault(operand.module, []).append(operand)
        rows = (row for row in self if not _explained(row, listed))
        return CoverageCheck(rows, self.matmuls, self.quantized_matmuls, "in float and not listed as such")

    def __str__(self) -> str:
        summary = f"{len(self)} operands {self.description}; {self.matmuls} matmuls ran"
        if not self:
            return summary
        header = ("module", "operation", "operand", "", "shape")
        return "\n".join([*aligned([header, *(row.cells() for row in self)]), "", summary])


_ACTIVATIONS = {"input", *ATTENTION_OPERANDS}


def _explained(row: FloatOperand, listed: dict[str, list[Operand]]) -> bool:
    parts = (row.layer or row.module).split(".")
    names = (".".join(parts[:end]) for end in range(len(parts), -1, -1))
    around = ([x for x in listed.get(name, ()) if x.of_layer or name == row.module] for name in names)
    operands = next(filter(None, around), [])
    weight = row.parameter or (not row.layer and row.position == MATMULS.get(row.operation, (None,))[-1])
    same_kind = [operand for operand in operands if (operand.operand not in _ACTIVATIONS) is weight]
    # The report lists no weights for attention modules, and only parameters for modules that are not layers.
    return any(operand.bits is None for operand in same_kind or operands)


def check_coverage(model: nn.Module, batch: Batch) -> CoverageCheck:
    """Run the model once on ``batch`` and list every matmul operand that was in floating point.

    The check observes the operations that PyTorch dispatches, independently of how the model was quantized. An operand
    counts as quantized if a quantizer returned it, with no more distinct values than its grid has; views, copies,
    changes of dtype, concatenation and multiplication by a number are allowed in between. Operands of fused kernels,
    such as torch's own ``scaled_dot_product_attention``, and of operators from outside PyTorch count as floating point.
    So does the ``weight`` of a quantized embedding if the model uses it without calling the module. An outer product
    (inner dimension 1) counts as a matmul only with a parameter. Works for any model, also a float model.

    Args:
        model: in training or evaluation mode, which is kept. Buffers and random state are restored.
        batch: a mapping of the forward's keyword arguments, such as a tokenizer or data collator returns, a tuple or
            list of positional arguments, or a single tensor; on the model's device. A key-value cache in it is
            extended.

    Returns:
        The operands in the order of first use, without duplicates; empty if nothing ran in float.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``, or ``batch`` has another type.
        ValueError: no matmul ran.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"check_coverage takes a model (an nn.Module), got {type(model).__name__}")
    check_batch(batch, "check_coverage takes")
    watch = OperandWatch(model)
    with without_trace(model) as runnable, watch.watching():
        run_batch(runnable, batch)
    if watch.matmuls == 0:
        raise ValueError(f"{type(model).__name__} ran without any matmul, so there was nothing to check")
    return CoverageCheck(watch.float_operands, watch.matmuls, watch.quantized_matmuls)
