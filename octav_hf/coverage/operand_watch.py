"""Observe the matmuls of a forward pass, and their operands, at the level of dispatched operations.

Quantization works at a higher level, so this is an independent check. It knows only the quantizers of this package, and
checks the values that they return.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from .._utils.torch_private import OpOverload, TorchDispatchMode, own_parameters, schema, storage_id, tree_leaves
from ..functional.rows import to_rows
from ..nn import FakeQuantize, PackedLayer, QuantizedEmbedding, QuantizedLayer
from ..nn.codes import Codes

MATMULS: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(("mm", "bmm", "mv", "dot", "vdot", "linear", "matmul", "_int_mm", "_grouped_mm"), (0, 1)),
    **dict.fromkeys(("addmm", "_addmm_activation", "addmv", "addbmm", "baddbmm"), (1, 2)),
    **dict.fromkeys(("convolution", "convolution_overrideable", "mkldnn_convolution", "cudnn_convolution"), (0, 1)),
    **dict.fromkeys(("_conv_depthwise2d", "conv_depthwise3d", "conv_tbc", "mkldnn_linear"), (0, 1)),
    **dict.fromkeys(("_cdist_forward", "_euclidean_dist"), (0, 1)),
    "_trilinear": (0, 1, 2),
    **dict.fromkeys(("qlinear_pointwise", "qconv_pointwise"), (0,)),
}
"""Operation -> positions of the operands, a layer's weight last; other operations decompose into these."""

# Fused operations, some of whose operands cannot be quantized.
_FUSED = {"mkldnn_rnn_layer", "_cudnn_rnn", "_transformer_encoder_layer_fwd"}
# Operations whose result has only values of their arguments, and zeros, which are on every grid.
_COPIES = {
    *("clone", "_to_copy", "contiguous", "copy", "cat", "stack", "repeat", "repeat_interleave", "flip", "roll"),
    *("index", "index_select", "gather", "take", "embedding", "masked_select", "constant_pad_nd", "masked_fill"),
    *("reflection_pad1d", "reflection_pad2d", "replication_pad1d", "replication_pad2d"),
}
# Operations whose result is uninitialized or zero, until values are copied into it.
_BLANKS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "zeros", "zeros_like", "new_zeros"}
# Operation -> position of the fill value, which must be zero.
_FILLED = {"constant_pad_nd": 2, "masked_fill": 2}
_SCALINGS = {"mul", "div", "neg"}
_SAMPLE = 4096  # values checked per clip

Origin = Literal["quantized", "parameter", "blank"]


@dataclass(frozen=True)
class FloatOperand:
    """A matmul operand in floating point."""

    module: str  # innermost named module whose forward was running
    operation: str
    position: int  # of the operation's argument, from 0
    shape: tuple[int, ...]
    parameter: bool  # whether it is a parameter, or a view or copy of one
    layer: str = ""  # quantized layer whose weight it is or is multiplied by, if another module reads that weight

    def cells(self) -> tuple[str, ...]:
        kind = "parameter" if self.parameter else "activation"
        if self.layer:
            kind += f" {'of' if self.parameter else 'multiplied by the weight of'} {self.layer}"
        return self.module or "(the model itself)", self.operation, str(self.position), kind, str(list(self.shape))


class OperandWatch(TorchDispatchMode):
    """Collects the unquantized operands of the matmuls that run within ``watching()``.

    Attributes:
        float_operands: the operands as dict keys, in the order of first use.
        matmuls: number of matmuls and convolutions that ran.
        quantized_matmuls: number of those without an operand in float.
    """

    supports_higher_order_operators = True  # such as flex attention

    def __init__(self, model: nn.Module):
        super().__init__()
        self.float_operands: dict[FloatOperand, None] = {}
        self.matmuls = self.quantized_matmuls = 0
        self._names = {module: name for name, module in model.named_modules()}
        self._running: list[nn.Module] = []
        # By storage, so that views share an origin. Holding the tensor keeps its address from being reused.
        self._origins: dict[int, tuple[Origin, Tensor]] = {}
        for parameter in model.parameters():
            self._mark(parameter, "parameter")
        self._owners: dict[int, dict[nn.Module, None]] = {}  # by storage: several modules may share a parameter
        for module in model.modules():
            for own in own_parameters(module).values():
                if own is not None:
                    self._owners.setdefault(_key(own), {})[module] = None

    @contextmanager
    def watching(self) -> Iterator["OperandWatch"]:
        before = register_module_forward_pre_hook(lambda module, args: self._running.append(module))
        after = register_module_forward_hook(self._leave, always_call=True)
        try:
            with self:
                yield self
        finally:
            before.remove()
            after.remove()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name, namespace = _name(func)
        is_view = isinstance(func, OpOverload) and func.is_view
        if not is_view and not any(isinstance(module, FakeQuantize) for module in self._running):
            self._record(name, namespace, args, kwargs)
        origin = self._origin_of_result(name, args)
        result = func(*args, **kwargs)
        written = list(_written(func, args, kwargs))
        for tensor in written or _tensors(result):
            if written:
                self._origins.pop(_key(tensor), None)
            if origin is not None:
                self._mark(tensor, origin)
            if origin == "parameter":
                self._owners[_key(tensor)] = {module: None for x in _tensors(args) for module in self._owners_of(x)}
        return result

    def _record(self, name: str, namespace: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if name in MATMULS:
            operands = [(position, args[position]) for position in MATMULS[name]]
            unquantized = [(position, x) for position, x in operands if self.origin(x) != "quantized"]
            if namespace == "aten" and not any(_is_float(x) for _, x in operands):
                return
            if self._is_outer_product(name, [x for _, x in operands]):
                return
        elif "attention" in name or name in _FUSED or namespace not in ("aten", "prim", "prims"):
            tensors = list(enumerate(_tensors((args, kwargs))))
            unquantized = [(position, x) for position, x in tensors if x.dim() >= 2]
            if not any(_is_float(x) for _, x in unquantized):
                return
        else:
            self._add(name, (argument for argument in enumerate(args) if self._is_unquantized_table(argument[1])))
            return
        self.matmuls += 1
        self.quantized_matmuls += not any(_is_float(x) for _, x in unquantized)
        self._add(name, unquantized)

    def _add(self, name: str, unquantized: Iterable[tuple[int, Tensor]]) -> None:
        module = next((self._names[module] for module in reversed(self._running) if module in self._names), "")
        operands = [(position, x) for position, x in unquantized if _is_float(x)]
        layer = next(filter(None, (self._layer_read_by_others(x) for _, x in operands)), "")
        for position, x in operands:
            row = FloatOperand(module, name, position, tuple(x.shape), self.origin(x) == "parameter", layer)
            self.float_operands[row] = None

    def _is_unquantized_table(self, x: Any) -> bool:
        """Whether this is the table of a quantized embedding, used outside its module."""
        owners = self._owners_of(x) if isinstance(x, Tensor) else {}
        tables = [each for each in owners if isinstance(each, QuantizedEmbedding) and not isinstance(each, PackedLayer)]
        return bool(tables) and not any(module in tables for module in self._running)

    def _layer_read_by_others(self, x: Tensor) -> str:
        """The name of the quantized layer whose weight this is, if none of the modules that own it is running."""
        owners = self._owners_of(x)
        layers = (self._names[module] for module in owners if isinstance(module, QuantizedLayer))
        return "" if any(module in owners for module in self._running) else next(layers, "")

    def _owners_of(self, x: Tensor) -> dict[nn.Module, None]:
        """The modules that own the parameter that this is, or a view or copy of."""
        return self._owners.get(_key(x), {}) if self.origin(x) == "parameter" else {}

    def _is_outer_product(self, name: str, operands: list[Tensor]) -> bool:
        """Whether each sum has one term and no operand is a parameter, so that this is elementwise multiplication."""
        inner_size_one = name in ("mm", "bmm", "matmul", "baddbmm", "addmm") and operands[0].shape[-1] == 1
        return inner_size_one and not any(self.origin(x) == "parameter" for x in operands)

    def origin(self, x: Tensor) -> Origin | None:
        """Where the values of ``x`` come from; ``None`` if they were computed by other operations."""
        return self._origins[_key(x)][0] if _key(x) in self._origins else None

    def _mark(self, x: Tensor, origin: Origin) -> None:
        self._origins[_key(x)] = origin, x

    def _origin_of_result(self, name: str, args: tuple[Any, ...]) -> Origin | None:
        """The common origin of a result that has the arguments' values, or multiples of them by a number."""
        base = name.removesuffix("_")
        if base in _BLANKS:
            return "blank"
        tensors = [x for x in _tensors(args) if _is_float(x)]
        if name == "_to_copy" and args[0].dtype in (torch.int8, torch.uint8):
            return "quantized"
        if name == "copy_":
            whole = args[0].numel() * args[0].element_size() == args[0].untyped_storage().nbytes()
            tensors = [args[1]] if whole else [args[0], args[1]]
        elif base in _SCALINGS:
            tensors = [x for x in tensors if x.numel() > 1] or tensors[:1]
            if len(tensors) > 1:
                return None
        elif base not in _COPIES:
            return None
        elif base in _FILLED and len(args) > _FILLED[base]:
            if bool(args[_FILLED[base]] != 0):
                return None
            tensors = tensors[:1]
        origins = {self.origin(x) for x in tensors}
        if len(origins) > 1:
            origins.discard("blank")
        return origins.pop() if len(origins) == 1 else None

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._running.pop()
        values = output.integers if isinstance(output, Codes) else output
        if isinstance(module, FakeQuantize) and isinstance(values, Tensor) and on_grid(values, module):
            self._mark(values, "quantized")


def on_grid(x: Tensor, quantizer: FakeQuantize) -> bool:
    """Whether a sample of ``x`` has no more distinct values per clip than the grid."""
    groups = quantizer.active_groups
    rows = [to_rows(x, quantizer.active_dim)[0]] if groups is None else groups.rows(x)
    for part in rows:
        ordered = part[:, :_SAMPLE].sort(dim=1).values
        distinct = (ordered[:, 1:] != ordered[:, :-1]).sum(dim=1) + 1
        if bool((distinct > 2**quantizer.num_bits).any()):
            return False
    return True


def _name(func: Callable[..., Any]) -> tuple[str, str]:
    """Name and namespace of an operator; a higher-order one has no namespace."""
    if isinstance(func, OpOverload):
        return schema(func).name.partition("::")[2], func.namespace
    return str(func), ""


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    if isinstance(func, OpOverload) and schema(func).is_mutable:
        for position, argument in enumerate(schema(func).arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                yield from _tensors(args[position] if position < len(args) else kwargs.get(argument.name))


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _is_float(x: Tensor) -> bool:
    return x.is_floating_point() or x.is_complex()


def _key(x: Tensor) -> int:
    return storage_id(x)
