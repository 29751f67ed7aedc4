"""The coverage report: every operand of a model's matmuls, how it is quantized, or why it is not."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

from torch import nn

from .._utils.text_table import aligned
from ..config import OctavConfig
from ..conversion.attention_modules import attention_modules
from ..conversion.layers import unknown_weights
from ..nn import (
    ATTENTION_OPERANDS,
    QUANTIZED_LAYERS,
    FakeQuantize,
    QuantizedAttention,
    QuantizedLayer,
    quantized_class_of,
)
from ..nn.granularity import granularity_of


@dataclass(frozen=True)
class Operand:
    """One operand of one module. ``reason`` says why it is left in float; it is empty for a quantized operand."""

    module: str
    kind: str  # "linear", "convolution", "embedding", "attention" or the class of another module with a weight matrix
    operand: str  # "weight", another parameter's name, "input", "query", "key", "probabilities" or "value"
    bits: int | None = None
    signed: bool | None = True  # None: as the tensor's values are, at every forward pass
    asymmetric: bool = False  # whether the unsigned grid begins below 0, or may do so
    clip: str = ""
    gradient_estimator: str = ""
    granularity: str = "tensor"  # what one clip is for; one of nn.granularity.Granularity
    frozen: bool = False  # whether the clip is that of a calibration, whatever the tensor's values are
    reason: str = ""

    def cells(self) -> tuple[str, ...]:
        """The operand as a row of the printed report."""
        if self.bits is None:
            return self.module, self.operand, "float", "", "", "", self.reason
        grid = {True: "signed", False: "asymmetric" if self.asymmetric else "unsigned", None: "by sign"}[self.signed]
        if self.signed is None and self.asymmetric:
            grid = "by range"
        return self.module, self.operand, str(self.bits), grid, self.clip_cell, self.gradient_estimator, ""

    @property
    def clip_cell(self) -> str:
        return f"{self.clip} per {self.granularity}{', frozen' if self.frozen else ''}"


class CoverageReport(list[Operand]):
    """The operands of a model in the order of its modules; ``print`` shows a table, ``summary`` a few lines."""

    def quantized(self, kind: str) -> list[Operand]:
        """The quantized operands of one kind: such as ``"linear"`` or ``"attention"``."""
        return [row for row in self if row.kind == kind and row.bits is not None]

    def left_in_float(self) -> list[Operand]:
        """The operands that are not quantized."""
        return [row for row in self if row.bits is None]

    def summary(self) -> str:
        """Counts, and what is left in float for which reason."""
        kinds = dict.fromkeys(["linear", "attention", *(layer.kind for layer in QUANTIZED_LAYERS.values())])
        lines = []
        for kind in kinds:
            of_kind = sum(row.kind == kind for row in self)
            if of_kind:
                lines.append(f"{len(self.quantized(kind))} of {of_kind} {kind} operands quantized")
        reasons: dict[str, list[str]] = {}
        for row in self.left_in_float():
            reasons.setdefault(row.reason, []).append(f"{row.module} {row.operand}")
        lines += [f"left in float, {reason}: {', '.join(names)}" for reason, names in reasons.items()]
        return "\n".join(lines)

    def __str__(self) -> str:
        header = ("module", "operand", "bits", "grid", "clip", "gradient", "left in float because")
        return "\n".join([*aligned([header, *(row.cells() for row in self)]), "", self.summary()])


def coverage_report(model: nn.Module) -> CoverageReport:
    """List every operand of the model's layers and attention matmuls, and every other weight matrix.

    Args:
        model: the module that ``apply_octav`` was called on; for any other, what is left in float has no known reason.

    Returns:
        One ``Operand`` each: two for a linear layer or convolution, four for an attention module, one for an embedding
        and for any other module with a weight of two or more dimensions.
    """
    modules = dict(model.named_modules())
    # The quantized model may stand inside another, such as PEFT's.
    roots = {
        name: module.__dict__["octav_config"] for name, module in modules.items() if "octav_config" in module.__dict__
    }
    attention = _attention(modules, roots)
    return CoverageReport(
        row for name, module in modules.items() for row in _rows(_Place(name, roots), module, attention)
    )


def _attention(modules: Mapping[str, nn.Module], roots: Mapping[str, OctavConfig]) -> set[str]:
    """The names of the attention modules: those that a root's config names, elsewhere those that are found."""
    found = set(attention_modules(modules))
    for root, config in roots.items():
        if config.attention_modules is not None:
            inside = {name: module for name, module in modules.items() if _name_in(root, name) is not None}
            named = attention_modules(
                {str(_name_in(root, name)): inside[name] for name in inside}, config.attention_modules
            )
            found = (found - inside.keys()) | {name for name in inside if _name_in(root, name) in named}
    return found


def _name_in(root: str, name: str) -> str | None:
    """The name that a module has in ``root``; ``None`` for one that is not in it."""
    if not root or name == root or name.startswith(f"{root}."):
        return name[len(root) :].removeprefix(".")
    return None


class _Place:
    """A module's name, and what the config asks of the module."""

    def __init__(self, name: str, roots: Mapping[str, OctavConfig]):
        self.name = name
        self._config: OctavConfig | None = None
        for root, config in roots.items():
            name_in_root = _name_in(root, name)
            if name_in_root is not None:
                self._config, self._name_in_root = config, name_in_root

    def reason(self, *needed: Iterable[str], otherwise: str = "it was added after apply_octav") -> str:
        """Why an operand is in float for which the config has to set a field of each of the ``needed`` groups."""
        if self._config is None:
            return "apply_octav was not called on this model"
        left_out = self._config.left_out([self._name_in_root])
        if left_out:
            return left_out[self._name_in_root]
        settings = self._config.settings_for([self._name_in_root])[self._name_in_root]
        for fields in needed:
            values = {field: getattr(settings, field) for field in fields}
            if not any(values.values()):
                unset = next(iter(values.values()))
                return f"{' and '.join(values)} {'is' if len(values) == 1 else 'are'} {unset}"
        return otherwise


def _rows(place: _Place, module: nn.Module, attention: Collection[str]) -> Iterator[Operand]:
    name = place.name
    layer = quantized_class_of(module)
    if isinstance(module, QuantizedLayer):
        for operand, field in module.operands.items():
            yield _row(name, module.kind, operand, getattr(module, f"{operand}_quantizer"), f"{field} is None")
    elif layer is not None:
        for operand in layer.operands:
            yield Operand(name, layer.kind, operand, reason=place.reason(layer.operands.values()))
    elif isinstance(module, QuantizedAttention):
        for operand in ATTENTION_OPERANDS:
            yield _row(name, "attention", operand, module.operand_quantizers[operand], "")
    elif name in attention:
        reason = place.reason(["activation_bits"], ["quantize_attention"])
        for operand in ATTENTION_OPERANDS:
            yield Operand(name, "attention", operand, reason=reason)
    else:
        kind = type(module).__name__
        for weight in unknown_weights(module):
            reason = place.reason(otherwise=f"{kind} is not a layer that can be quantized")
            yield Operand(name, kind, weight, reason=reason)


def _row(name: str, kind: str, operand: str, quantizer: nn.Module, reason: str) -> Operand:
    if not isinstance(quantizer, FakeQuantize):
        return Operand(name, kind, operand, reason=reason)
    return Operand(
        name,
        kind,
        operand,
        bits=quantizer.num_bits,
        signed=quantizer.signed if quantizer.frozen is None else quantizer.frozen.signed,
        asymmetric=quantizer.asymmetric if quantizer.frozen is None else quantizer.frozen.offset != 0,
        clip=quantizer.clip,
        gradient_estimator=quantizer.gradient_estimator,
        granularity=granularity_of(operand, quantizer.active_dim),
        frozen=quantizer.is_frozen,
    )
