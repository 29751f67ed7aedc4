"""Watching a forward pass below the level that quantization works on: which matmuls ran, and on what.

Everything here is read off the operations that PyTorch dispatched and the data they were given. All it knows of this
package is what a quantizer is, and it takes no quantizer's word: a result counts as quantized if its values show it.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from .._utils.torch_private import OpOverload, TorchDispatchMode, schema, storage_id, tree_leaves
from ..nn import FakeQuantize, PackedLayer, QuantizedEmbedding

MATMULS: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(("mm", "bmm", "mv", "dot", "vdot", "linear", "matmul", "_int_mm", "_grouped_mm"), (0, 1)),
    **dict.fromkeys(("addmm", "_addmm_activation", "addmv", "addbmm", "baddbmm"), (1, 2)),
    **dict.fromkeys(("convolution", "convolution_overrideable", "mkldnn_convolution", "cudnn_convolution"), (0, 1)),
    **dict.fromkeys(("_conv_depthwise2d", "conv_depthwise3d", "conv_tbc", "mkldnn_linear"), (0, 1)),
    **dict.fromkeys(("_cdist_forward", "_euclidean_dist"), (0, 1)),
    "_trilinear": (0, 1, 2),
}
"""Operation -> positions of the operands that are multiplied; a layer's weight comes last. Linear, matmul, einsum and
attention written out arrive as these."""

# Operations that multiply inside, where no operand can be quantized.
_FUSED = {"mkldnn_rnn_layer", "_cudnn_rnn", "_transformer_encoder_layer_fwd"}
# Operations whose result holds values of their arguments, and perhaps zeros, which are on every grid.
_COPIES = {
    *("clone", "_to_copy", "contiguous", "copy", "cat", "stack", "repeat", "repeat_interleave", "flip", "roll"),
    *("index", "index_select", "gather", "take", "embedding", "masked_select", "constant_pad_nd", "masked_fill"),
    *("reflection_pad1d", "reflection_pad2d", "replication_pad1d", "replication_pad2d"),
}
# Operations whose result holds nothing yet, or zeros: it becomes what is copied into it.
_BLANKS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "zeros", "zeros_like", "new_zeros"}
# Where a number is filled in, its position; it must be zero.
_FILLED = {"constant_pad_nd": 2, "masked_fill": 2}
_SCALINGS = {"mul", "div", "neg"}
# Values of each clip's share that are looked at.
_SAMPLE = 4096

Origin = Literal["quantized", "parameter", "blank"]


@dataclass(frozen=True)
class FloatOperand:
    """An operand that was multiplied in floating point, by a matmul that ran once or more often."""

    module: str  # the innermost named module whose forward was running
    operation: str  # PyTorch's name for it
    position: int  # of the operand among the operation's arguments, from 0
    shape: tuple[int, ...]
    parameter: bool  # whether it is a parameter, through views and copies, or else an activation

    def cells(self) -> tuple[str, ...]:
        """The operand as a row of the printed result."""
        kind = "parameter" if self.parameter else "activation"
        return self.module or "(the model itself)", self.operation, str(self.position), kind, str(list(self.shape))


class OperandWatch(TorchDispatchMode):
    """While active, and within ``watching()``, collects the matmuls that run on unquantized operands.

    Attributes:
        float_operands: in the order in which they were first met, as the keys of a dictionary.
        matmuls: how many matmuls and convolutions ran.
    """

    supports_higher_order_operators = True  # such as flex attention, which must be seen too

    def __init__(self, model: nn.Module):
        super().__init__()
        self.float_operands: dict[FloatOperand, None] = {}
        self.matmuls = 0
        self._names = {module: name for name, module in model.named_modules()}
        self._running: list[nn.Module] = []
        # By storage, so that views need no rule. The tensor is kept: no later storage can then have the same address.
        self._origins: dict[int, tuple[Origin, Tensor]] = {}
        for parameter in model.parameters():
            self._mark(parameter, "parameter")
        self._tables: dict[int, list[nn.Module]] = {}  # by storage: several modules may share one table
        for module in model.modules():
            if isinstance(module, QuantizedEmbedding) and not isinstance(module, PackedLayer):
                self._tables.setdefault(_key(module.weight), []).append(module)

    @contextmanager
    def watching(self) -> Iterator["OperandWatch"]:
        """Active while the context lasts, in every module that runs in it."""
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
        return result

    def _record(self, name: str, namespace: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if name in MATMULS:
            operands = [(position, args[position]) for position in MATMULS[name]]
            unquantized = [(position, x) for position, x in operands if self.origin(x) != "quantized"]
            if not any(_is_float(x) for _, x in operands) or self._is_outer_product(name, [x for _, x in operands]):
                return
        elif "attention" in name or name in _FUSED or namespace not in ("aten", "prim", "prims"):
            tensors = list(enumerate(_tensors((args, kwargs))))
            unquantized = [(position, x) for position, x in tensors if x.dim() >= 2]
            if not any(_is_float(x) for _, x in unquantized):
                return
        else:
            self._add(name, (argument for argument in enumerate(args) if self._is_read_past_its_quantizer(argument[1])))
            return
        self.matmuls += 1
        self._add(name, unquantized)

    def _add(self, name: str, unquantized: Iterable[tuple[int, Tensor]]) -> None:
        module = next((self._names[module] for module in reversed(self._running) if module in self._names), "")
        for position, x in unquantized:
            if _is_float(x):
                row = FloatOperand(module, name, position, tuple(x.shape), self.origin(x) == "parameter")
                self.float_operands[row] = None

    def _is_read_past_its_quantizer(self, x: Any) -> bool:
        """Whether this is an embedding table that is not looked up in, but whose ``weight`` is used as it is."""
        sharing = self._tables.get(_key(x), []) if isinstance(x, Tensor) else []
        return bool(sharing) and not any(module in sharing for module in self._running)

    def _is_outer_product(self, name: str, operands: list[Tensor]) -> bool:
        """Whether nothing is added up, so that this is no more a matmul than any elementwise multiplication."""
        inner_size_one = name in ("mm", "bmm", "matmul", "baddbmm", "addmm") and operands[0].shape[-1] == 1
        return inner_size_one and not any(self.origin(x) == "parameter" for x in operands)

    def origin(self, x: Tensor) -> Origin | None:
        """Where the values of ``x`` come from, if they come unchanged from one of those."""
        return self._origins[_key(x)][0] if _key(x) in self._origins else None

    def _mark(self, x: Tensor, origin: Origin) -> None:
        self._origins[_key(x)] = origin, x

    def _origin_of_result(self, name: str, args: tuple[Any, ...]) -> Origin | None:
        """The origin of a result that holds the arguments' values, or multiples of them by one number."""
        base = name.removesuffix("_")
        if base in _BLANKS:
            return "blank"
        tensors = [x for x in _tensors(args) if _is_float(x)]
        if base == "copy" and name == "copy_":
            whole = args[0].numel() * args[0].element_size() == args[0].untyped_storage().nbytes()
            tensors = [args[1]] if whole else [args[0], args[1]]
        elif base in _SCALINGS:
            tensors = [x for x in tensors if x.numel() > 1] or tensors[:1]
            if len(tensors) > 1:
                return None
        elif base not in _COPIES:
            return None
        elif base in _FILLED and len(args) > _FILLED[base]:
            if bool(torch.as_tensor(args[_FILLED[base]]) != 0):
                return None
            tensors = tensors[:1]
        origins = {self.origin(x) for x in tensors}
        if len(origins) > 1:
            origins.discard("blank")
        return origins.pop() if len(origins) == 1 else None

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._running.pop()
        if isinstance(module, FakeQuantize) and isinstance(output, Tensor) and on_grid(output, module):
            self._mark(output, "quantized")


def on_grid(x: Tensor, quantizer: FakeQuantize) -> bool:
    """Whether the values of ``x`` that share a clip (some of them are looked at) are no more than the levels."""
    dim = quantizer.active_dim
    if dim is None:
        rows = x.reshape(-1)
    else:
        shared = [dim] if isinstance(dim, int) else list(dim)
        rows = x.movedim(shared, list(range(-len(shared), 0))).flatten(-len(shared))
    ordered = rows[..., :_SAMPLE].sort(dim=-1).values
    distinct = (ordered[..., 1:] != ordered[..., :-1]).sum(dim=-1) + 1
    return bool((distinct <= 2**quantizer.num_bits).all())


def _name(func: Callable[..., Any]) -> tuple[str, str]:
    """Name and namespace of an operator; a higher-order one is in none."""
    if isinstance(func, OpOverload):
        return schema(func).name.partition("::")[2], func.namespace
    return str(func), ""


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    """The arguments that an operator writes to."""
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
