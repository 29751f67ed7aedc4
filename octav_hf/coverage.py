"""The coverage report: every operand of a model's matmuls, how it is quantized, or why it is not."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from .attention_modules import attention_modules
from .config import OctavConfig
from .nn import ATTENTION_OPERANDS, FakeQuantize, QuantizedAttention, QuantizedLayer, quantized_class_of


@dataclass(frozen=True)
class Operand:
    """One operand of one module. ``reason`` says why it is left in float; it is empty for a quantized operand."""

    module: str
    kind: str  # "linear", "attention" or the class of another module with a weight matrix
    operand: str  # "weight", "input", "query", "key", "probabilities" or "value"
    bits: int | None = None
    signed: bool = True
    clip: str = ""
    gradient: str = ""
    per_row: bool = False
    reason: str = ""

    def cells(self) -> tuple[str, ...]:
        """The operand as a row of the printed report."""
        if self.bits is None:
            return self.module, self.operand, "float", "", "", "", self.reason
        grid = f"{'signed' if self.signed else 'unsigned'}"
        return self.module, self.operand, str(self.bits), grid, self.clip_cell, self.gradient, ""

    @property
    def clip_cell(self) -> str:
        return f"{self.clip} per {'row' if self.per_row else 'tensor'}"


class CoverageReport(list[Operand]):
    """The operands of a model in the order of its modules; ``print`` shows a table, ``summary`` a few lines."""

    def quantized(self, kind: str) -> list[Operand]:
        """The quantized operands of ``"linear"`` layers or of ``"attention"``."""
        return [row for row in self if row.kind == kind and row.bits is not None]

    def left_in_float(self) -> list[Operand]:
        """The operands that are not quantized."""
        return [row for row in self if row.bits is None]

    def summary(self) -> str:
        """Counts, and what is left in float for which reason."""
        lines = []
        for kind in ("linear", "attention"):
            of_kind = [row for row in self if row.kind == kind]
            lines.append(f"{len(self.quantized(kind))} of {len(of_kind)} {kind} operands quantized")
        reasons: dict[str, list[str]] = {}
        for row in self.left_in_float():
            reasons.setdefault(row.reason, []).append(f"{row.module} {row.operand}")
        lines += [f"left in float, {reason}: {', '.join(names)}" for reason, names in reasons.items()]
        return "\n".join(lines)

    def __str__(self) -> str:
        header = ("module", "operand", "bits", "grid", "clip", "gradient", "left in float because")
        table = [header, *(row.cells() for row in self)]
        widths = [max(len(cells[column]) for cells in table) for column in range(len(header))]
        rows = ("  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) for cells in table)
        return "\n".join([*(row.rstrip() for row in rows), "", self.summary()])


def coverage_report(model: nn.Module) -> CoverageReport:
    """List every operand of the model's linear layers and attention matmuls, and every other weight matrix.

    Args:
        model: the module that ``apply_octav`` was called on; for any other, what is left in float has no known reason.

    Returns:
        One ``Operand`` each: two for a linear layer, four for an attention module, one for an embedding or another
        module with a weight of two or more dimensions.
    """
    attention = dict(attention_modules(model))
    return CoverageReport(
        row for name, module in model.named_modules() for row in _rows(model, name, module, attention)
    )


def _rows(root: nn.Module, name: str, module: nn.Module, attention: dict[str, nn.Module]) -> Iterator[Operand]:
    config: OctavConfig | None = getattr(root, "octav_config", None)
    layer = quantized_class_of(module)
    if isinstance(module, QuantizedLayer):
        for operand in module.operands:
            bits = "activation_bits" if operand == "input" else "weight_bits"
            yield _row(name, module.kind, operand, getattr(module, f"{operand}_quantizer"), f"{bits} is None")
    elif layer is not None:
        for operand in layer.operands:
            yield Operand(
                name, layer.kind, operand, reason=_reason(config, name, "weight_bits and activation_bits are None")
            )
    elif isinstance(module, QuantizedAttention):
        for operand in ATTENTION_OPERANDS:
            yield _row(name, "attention", operand, module.operand_quantizers[operand], "")
    elif name in attention:
        off = "quantize_attention is False"
        if config is not None and config.settings_for(name).activation_bits is None:
            off = "activation_bits is None"
        for operand in ATTENTION_OPERANDS:
            yield Operand(name, "attention", operand, reason=_reason(config, name, off))
    else:
        weight = module._parameters.get("weight")
        if weight is not None and weight.dim() > 1:
            kind = type(module).__name__
            yield Operand(name, kind, "weight", reason=f"only linear layers and attention are quantized, not {kind}")


def _row(name: str, kind: str, operand: str, quantizer: nn.Module, reason: str) -> Operand:
    if not isinstance(quantizer, FakeQuantize):
        return Operand(name, kind, operand, reason=reason)
    return Operand(
        name,
        kind,
        operand,
        bits=quantizer.num_bits,
        signed=quantizer.signed,
        clip=quantizer.clip,
        gradient=quantizer.gradient,
        per_row=quantizer.dim is not None,
    )


def _reason(config: OctavConfig | None, name: str, otherwise: str) -> str:
    if config is None:
        return "apply_octav was not called on this model"
    pattern = config.excluded_by(name)
    return f"excluded by {pattern!r}" if pattern else otherwise
