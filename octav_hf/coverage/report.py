"""The coverage report: every operand of a model's matmuls, how it is quantized, or why it is not."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

from torch import nn

from .._utils.text_table import aligned
from ..config import OctavConfig
from ..conversion.attention_modules import attention_modules
from ..conversion.layers import running_module, unknown_weights
from ..nn import (
    ATTENTION_OPERANDS,
    QUANTIZED_LAYERS,
    FakeQuantize,
    HoldsFrozenClips,
    QuantizedAttention,
    QuantizedLayer,
    quantized_class_of,
)
from ..nn.granularity import granularity_in_words, granularity_of


@dataclass(frozen=True)
class Operand:
    """One operand of one module."""

    module: str
    kind: str  # "linear", "convolution", "embedding", "attention", or the class name of another module with parameters
    operand: str  # "weight", the name of another parameter, "input", "query", "key", "probabilities" or "value"
    bits: int | None = None
    signed: bool | None = True  # None: depends on the tensor at every forward pass
    asymmetric: bool = False  # whether the unsigned grid may begin below 0
    clip: str = ""
    gradient_estimator: str = ""
    granularity: str = "tensor"  # one of nn.granularity.Granularity
    group_size: int | None = None
    frozen: bool = False  # whether the clip is frozen
    reason: str = ""  # why it is in float; empty if it is quantized
    arithmetic: str = ""  # how its integers are multiplied after convert_octav; empty for floating-point matmuls

    def cells(self) -> tuple[str, ...]:
        if self.bits is None:
            return self.module, self.operand, "float", "", "", "", self.reason
        unsigned, unknown = ("asymmetric", "by range") if self.asymmetric else ("unsigned", "by sign")
        grid = {True: "signed", False: unsigned, None: unknown}[self.signed]
        return self.module, self.operand, str(self.bits), grid, self.clip_cell, self.gradient_estimator, ""

    @property
    def of_layer(self) -> bool:
        """Whether its module is a layer or an attention module, not another module with parameters."""
        return self.kind in _kinds()

    @property
    def clip_cell(self) -> str:
        return f"{self.clip} per {self.granularity_in_words}{', frozen' if self.frozen else ''}"

    @property
    def granularity_in_words(self) -> str:
        """The granularity, with the size of groups."""
        return granularity_in_words(self.granularity, self.group_size)


class CoverageReport(list[Operand]):
    """The operands of a model in the order of its modules. ``print`` shows a table."""

    def quantized(self, kind: str) -> list[Operand]:
        """The quantized operands of one kind, such as ``"linear"`` or ``"attention"``."""
        return [row for row in self if row.kind == kind and row.bits is not None]

    def left_in_float(self) -> list[Operand]:
        return [row for row in self if row.bits is None]

    def summary(self) -> str:
        """Counts per kind, and the operands in float by reason, as lines of text."""
        lines = []
        for kind in _kinds():
            total = sum(row.kind == kind for row in self)
            if total:
                lines.append(f"{len(self.quantized(kind))} of {total} {kind} operands quantized")
        if any(row.arithmetic for row in self):
            modules = {row.module: row.arithmetic for row in self if row.bits is not None and row.kind != "embedding"}
            lines.append(f"{sum(map(bool, modules.values()))} of {len(modules)} modules compute integer matmuls")
        reasons: dict[str, list[str]] = {}
        for row in self.left_in_float():
            reasons.setdefault(row.reason, []).append(f"{row.module} {row.operand}")
        lines += [f"left in float, {reason}: {', '.join(names)}" for reason, names in reasons.items()]
        return "\n".join(lines)

    def __str__(self) -> str:
        table: list[tuple[str, ...]] = [
            ("module", "operand", "bits", "grid", "clip", "gradient", "left in float because")
        ]
        table += [row.cells() for row in self]
        if any(row.arithmetic for row in self):
            column = "multiplies", *(row.arithmetic or ("values" if row.bits else "") for row in self)
            table = [(*cells, last) for cells, last in zip(table, column, strict=True)]
        return "\n".join([*aligned(table), "", self.summary()])


def _kinds() -> list[str]:
    return list(dict.fromkeys(["linear", "attention", *(layer.kind for layer in QUANTIZED_LAYERS.values())]))


def coverage_report(model: nn.Module) -> CoverageReport:
    """List every operand of the model's layers and attention matmuls, and other parameters that may be operands.

    Args:
        model: the model that ``apply_octav`` was called on, or a model that contains it, such as PEFT's. For other
            models, the reasons are unknown.

    Returns:
        Two operands for a linear layer or convolution, four for an attention module, one for an embedding. For other
        modules except norms, the floating-point parameters with two or more dimensions whose name does not contain
        ``bias``; they are in float. Some are weights, such as those of experts, others are only added, such as position
        embeddings; ``check_coverage`` tells which. Own parameters of quantized attention modules are not listed: these
        modules refuse to multiply with them. Parameters in an ``nn.ParameterList`` are listed for the module that uses
        it.
    """
    modules = dict(model.named_modules())
    roots = {
        name: module.__dict__["octav_config"] for name, module in modules.items() if "octav_config" in module.__dict__
    }
    attention = _attention(modules, roots)
    return CoverageReport(
        row
        for name, module in modules.items()
        for row in (*_rows(_Place(name, roots), module, attention), *_parameters(_Place(name, roots), modules))
    )


def _attention(modules: Mapping[str, nn.Module], roots: Mapping[str, OctavConfig]) -> set[str]:
    """The names of the attention modules: those that a root's config lists, otherwise those found by class."""
    found = set(attention_modules(modules))
    for root, config in roots.items():
        if config.attention_modules is not None:
            inside = {name: local for name in modules if (local := _name_in(root, name)) is not None}
            by_local_name = {local: modules[name] for name, local in inside.items()}
            listed = attention_modules(by_local_name, config.attention_modules)
            found = (found - inside.keys()) | {name for name, local in inside.items() if local in listed}
    return found


def _name_in(root: str, name: str) -> str | None:
    """A module's name relative to ``root``; ``None`` if it is outside."""
    if not root or name == root or name.startswith(f"{root}."):
        return name[len(root) :].removeprefix(".")
    return None


class _Place:
    def __init__(self, name: str, roots: Mapping[str, OctavConfig]):
        self.name = name
        self._config: OctavConfig | None = None
        for root, config in roots.items():
            name_in_root = _name_in(root, name)
            if name_in_root is not None:
                self._config, self._name_in_root = config, name_in_root

    def reason(self, *needed: Iterable[str], otherwise: str = "it was added after apply_octav") -> str:
        """Why an operand is in float; it would be quantized if a field of each group in ``needed`` were set."""
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
            yield _row(name, module, module.kind, operand, f"{field} is None")
    elif layer is not None:
        for operand in layer.operands:
            yield Operand(name, layer.kind, operand, reason=place.reason(layer.operands.values()))
    elif isinstance(module, QuantizedAttention):
        for operand in ATTENTION_OPERANDS:
            yield _row(name, module, "attention", operand, "")
    elif name in attention:
        reason = place.reason(["activation_bits"], ["quantize_attention"])
        for operand in ATTENTION_OPERANDS:
            yield Operand(name, "attention", operand, reason=reason)


def _parameters(place: _Place, modules: Mapping[str, nn.Module]) -> Iterator[Operand]:
    """The parameters of a module that is not a layer, listed for the innermost enclosing module with a forward."""
    module = modules[place.name]
    runner = running_module(place.name, modules)
    if quantized_class_of(module) is not None or isinstance(modules[runner], QuantizedAttention):
        return
    kind = type(modules[runner]).__name__
    for parameter in unknown_weights(module):
        which = kind if "weight" in parameter else f"a parameter of {kind}, which"
        reason = f"{which} is not a layer that can be quantized"
        operand = f"{place.name}.{parameter}".removeprefix(".")[len(runner) :].removeprefix(".")
        yield Operand(runner, kind, operand, reason=place.reason(otherwise=reason))


def _row(name: str, module: HoldsFrozenClips, kind: str, operand: str, reason: str) -> Operand:
    quantizer = module.operand_quantizers[operand]
    if not isinstance(quantizer, FakeQuantize):
        return Operand(name, kind, operand, reason=reason)
    size = None if quantizer.active_groups is None else quantizer.active_groups.size
    return Operand(
        name,
        kind,
        operand,
        bits=quantizer.num_bits,
        signed=quantizer.signed if quantizer.frozen is None else quantizer.frozen.signed,
        asymmetric=quantizer.asymmetric if quantizer.frozen is None else quantizer.frozen.offset is not None,
        clip=quantizer.clip,
        gradient_estimator=quantizer.gradient_estimator,
        granularity=granularity_of(operand, quantizer.active_dim, size),
        group_size=size,
        frozen=quantizer.is_frozen,
        arithmetic=str(getattr(module, "arithmetic", None) or ""),
    )
