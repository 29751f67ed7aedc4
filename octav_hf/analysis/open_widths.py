"""The bits of a quantized model that can be chosen, and what they cost."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from .._utils.forward_pass import Batch, run_batches
from .._utils.name_patterns import NamePatterns
from .._utils.torch_private import own_parameters
from ..conversion.modules import shared_weights
from ..conversion.request import Request
from ..nn import FakeQuantize, PackedWeight, QuantizedAttention, QuantizedLayer, quantized_class_of

_FLOAT_BITS = 32  # of an operand in float, whatever its dtype


@dataclass(frozen=True, eq=False)
class Width:
    """A number of bits that can be chosen.

    Attributes:
        settings: full name of the module and field of ``ModuleSettings``; several for tied weights.
        quantizers: those with this number of bits.
    """

    settings: tuple[tuple[str, str], ...]
    quantizers: tuple[FakeQuantize, ...]


@dataclass(frozen=True)
class Block:
    """Widths with a common cost; ``cost()`` computes it from the current bits of their quantizers."""

    widths: tuple[Width, ...]
    cost: Callable[[], int]


@contextmanager
def with_bits(widths: Iterable[Width], bits: Iterable[int]) -> Iterator[None]:
    """Context in which the quantizers of ``widths`` have these ``bits``."""
    quantizers = [
        (quantizer, number) for width, number in zip(widths, bits, strict=True) for quantizer in width.quantizers
    ]
    before = [quantizer.num_bits for quantizer, _ in quantizers]
    try:
        for quantizer, number in quantizers:
            quantizer.num_bits = number
        yield
    finally:
        for (quantizer, _), number in zip(quantizers, before, strict=True):
            quantizer.num_bits = number


class OpenWidths:
    """The widths of a model that neither an override nor ``first_last_bits`` sets."""

    def __init__(self, request: Request):
        self._request = request
        self._overrides = NamePatterns(request.config.module_overrides)

    def of_bytes(self) -> Iterator[Block]:
        """A block for each weight that ``pack_octav`` packs, with the bytes of its integers and scales."""
        shared = shared_weights(self._request.model)
        for name, layer in self._layers():
            width = self._width([(name, layer)], "weight")
            if width is not None and layer not in shared:
                yield Block((width,), partial(_packed_bytes, layer))

    def of_operations(self, multiplications: Mapping[str, int]) -> Iterator[Block]:
        """A block for each layer and attention module that ran, with its bit operations.

        Layers with a common weight are one block. An override of an attention module also applies to the layers inside
        it, so its width is open only if the widths of all these layers are.
        """
        by_weight: dict[int, list[tuple[str, Any]]] = {}
        for name, layer in self._layers():
            weight = own_parameters(layer).get("weight", layer)
            by_weight.setdefault(id(weight), []).append((name, layer))
        open_inputs = set()
        for tied in by_weight.values():
            running = [(name, layer) for name, layer in tied if multiplications.get(name)]
            if not running:
                continue
            inputs = {name: self._width([(name, layer)], "input") for name, layer in running}
            open_inputs |= {name for name, width in inputs.items() if width is not None}
            factors = [
                (multiplications[name], layer.weight_quantizer, layer.input_quantizer) for name, layer in running
            ]
            yield from _block([self._width(tied, "weight"), *inputs.values()], factors)
        for name, module in self._request.modules.items():
            inside = {
                other
                for other, layer in self._request.modules.items()
                if other.startswith(f"{name}.") and quantized_class_of(layer) and other not in self._request.left_out
            }
            if isinstance(module, QuantizedAttention) and multiplications.get(name) and inside <= open_inputs:
                # All four operands have the same bits.
                quantizers = module.operand_quantizers
                width = self._width([(name, module)], *quantizers)
                yield from _block([width], [(multiplications[name], quantizers["query"], quantizers["key"])])

    def _layers(self) -> Iterator[tuple[str, Any]]:
        return ((name, module) for name, module in self._request.modules.items() if isinstance(module, QuantizedLayer))

    def _width(self, modules: Iterable[tuple[str, Any]], *operands: str) -> Width | None:
        """The width of these operands of ``modules``; ``None`` if it is set for one of them, or one is in float."""
        settings, quantizers = [], []
        for name, module in modules:
            field = module.operands[operands[0]] if isinstance(module, QuantizedLayer) else "activation_bits"
            if name in self._request.edges or any(
                field in self._request.config.module_overrides[pattern] for pattern in self._overrides.matching(name)
            ):
                return None
            settings.append((name, field))
            quantizers += [module.operand_quantizers[operand] for operand in operands]
        if not all(isinstance(quantizer, FakeQuantize) for quantizer in quantizers):
            return None
        return Width(tuple(settings), tuple(quantizers))


def multiplications(model: nn.Module, batches: Iterable[Batch]) -> dict[str, int]:
    """Full name -> multiply-accumulates of each layer and attention module in the forward passes of ``batches``."""
    with FlopCounterMode(display=False) as counter:
        run_batches(model, batches, "multiplications", None)
    root = type(model).__name__
    counted = {
        name: sum(operations.values()) // 2  # a multiplication and an addition
        for name, operations in counter.get_flop_counts().items()
    }
    modules = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, QuantizedLayer | QuantizedAttention)
    }
    found = {name: counted.get(f"{root}.{name}" if name else root, 0) for name in modules}
    for name, module in modules.items():
        if isinstance(module, QuantizedAttention):
            found[name] -= sum(count for other, count in found.items() if other.startswith(f"{name}."))
    return found


def _block(widths: Iterable[Width | None], factors: list[tuple[int, nn.Module, nn.Module]]) -> Iterator[Block]:
    """The block of the open widths, if there are any; its bit operations are the sum of the products in ``factors``."""
    found = tuple(width for width in widths if width is not None)
    if found:
        yield Block(found, lambda: sum(number * _bits(left) * _bits(right) for number, left, right in factors))


def _bits(quantizer: nn.Module) -> int:
    return quantizer.num_bits if isinstance(quantizer, FakeQuantize) else _FLOAT_BITS


def _packed_bytes(layer: Any) -> int:
    packed = PackedWeight(layer.weight_quantizer, layer.weight, is_frozen=False)  # on the meta device
    return packed.packed_data.nbytes + packed.scale.nbytes
