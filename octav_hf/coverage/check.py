"""The coverage check: one forward pass, and every matmul in it that had an operand in floating point."""

from collections.abc import Iterable

from torch import nn

from .._utils.forward_pass import Batch, check_batch, run_batch, without_trace
from .._utils.text_table import aligned
from .operand_watch import MATMULS, FloatOperand, OperandWatch
from .report import CoverageReport, Operand


class CoverageCheck(list[FloatOperand]):
    """What ``check_coverage`` found: empty if every operand of every matmul was quantized; ``print`` shows a table.

    Attributes:
        matmuls: how many matmuls and convolutions ran, on quantized operands or not.
        description: what the operands in it have in common.
    """

    def __init__(self, rows: Iterable[FloatOperand], matmuls: int, description: str = "in float"):
        super().__init__(rows)
        self.matmuls = matmuls
        self.description = description

    def unexplained(self, report: CoverageReport) -> "CoverageCheck":
        """Those that ``coverage_report`` of the same model does not list as left in float.

        A row belongs to the innermost module that contains it and is in the report; its weight is
        explained by a weight left in float, and its input by an input.
        """
        listed: dict[str, list[Operand]] = {}
        for operand in report:
            listed.setdefault(operand.module, []).append(operand)
        rows = (row for row in self if not _explained(row, listed))
        return CoverageCheck(rows, self.matmuls, "in float and not listed as such")

    def __str__(self) -> str:
        summary = f"{len(self)} operands {self.description}; {self.matmuls} matmuls ran"
        if not self:
            return summary
        header = ("module", "operation", "operand", "", "shape")
        return "\n".join([*aligned([header, *(row.cells() for row in self)]), "", summary])


def _explained(row: FloatOperand, listed: dict[str, list[Operand]]) -> bool:
    parts = row.module.split(".")
    names = (".".join(parts[:end]) for end in range(len(parts), -1, -1))
    operands = next((listed[name] for name in names if name in listed), [])
    weight = row.parameter or row.position == MATMULS.get(row.operation, (None,))[-1]
    of_its_kind = [operand for operand in operands if (operand.operand == "weight") is weight]
    # Of an attention module the report lists no weight, of a layer that is never quantized nothing else.
    return any(operand.bits is None for operand in of_its_kind or operands)


def check_coverage(model: nn.Module, batch: Batch) -> CoverageCheck:
    """Run the model once on ``batch`` and list every operand that was multiplied in floating point.

    Independent of how the model was quantized: the operations that PyTorch dispatches are watched, below modules and
    functions, and an operand counts as quantized if a quantizer made it (views, copies, changes of dtype, concatenation
    and multiplication by one number included) and its values are no more than the levels of the quantizer's grid. All
    operands of a fused kernel, such as torch's own ``scaled_dot_product_attention``, count as floating point, and so
    do those of any operator from outside PyTorch, and a quantized embedding's table wherever a model uses its
    ``weight`` without calling it. An outer product (inner dimension 1) is no matmul, unless it is with a
    parameter. Works for any model, a float one included.

    Args:
        model: in training or evaluation mode, which is kept. Its buffers and the random state are as before afterwards.
        batch: a mapping of the forward's keyword arguments, as a tokenizer or a data collator returns; a tuple or list
            of positional ones; or a tensor, the only one. On the model's device. A key-value cache in it is extended,
            as by any forward pass.

    Returns:
        The operands in the order in which they were met, each once; empty means that nothing ran in float.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``, or ``batch`` none of those.
        ValueError: the model ran without any matmul, so that nothing was checked.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"check_coverage takes a model (an nn.Module), got {type(model).__name__}")
    check_batch(batch, "check_coverage takes")
    watch = OperandWatch(model)
    with without_trace(model) as runnable, watch.watching():
        run_batch(runnable, batch)
    if watch.matmuls == 0:
        raise ValueError(f"{type(model).__name__} ran without any matmul, so there was nothing to check")
    return CoverageCheck(watch.float_operands, watch.matmuls)
