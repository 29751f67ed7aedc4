"""The weight of a packed layer as a read-only tensor."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .._utils.torch_private import make_wrapper, no_torch_function, schema, tree_leaves, tree_map


def packed_message(name: str, shape: torch.Size, problem: str) -> str:
    """Error message for an operation that a packed weight does not support; ``name`` is that of its quantizer."""
    return (
        f"{name or 'weight'}: this weight of shape {tuple(shape)} is packed and {problem}; "
        "call octav_hf.unpack_octav(model) first"
    )


class PackedTensor(Tensor):
    """A read-only tensor without memory of its own: each operation on it gets freshly dequantized values.

    Reading shape, dtype and device does not dequantize. Results are plain tensors, except views, which are read-only
    too. Writes raise ``RuntimeError``, because they would be lost: in-place operations, writes through ``data`` or a
    view, ``out=``, and setting an attribute. Functions that need an address raise it too.

    Args:
        read: returns the values.
        like: a tensor, possibly on the meta device, with their shape, strides and dtype.
        device: device of the values.
        refusal: error message for a write.
    """

    _read: Callable[[], Tensor]
    _refusal: str

    __torch_function__ = no_torch_function  # type: ignore[assignment]

    def __new__(cls, read: Callable[[], Tensor], like: Tensor, device: torch.device, refusal: str) -> "PackedTensor":
        tensor = make_wrapper(cls, like.shape, strides=like.stride(), dtype=like.dtype, device=device)
        tensor.__dict__.update(_read=read, _refusal=refusal)
        return tensor

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for packed in _written(func, args, kwargs):
            raise RuntimeError(packed._refusal)
        base = args[0] if args else None
        if func is torch.ops.aten.detach.default and isinstance(base, PackedTensor):
            return cls(base._read, base, base.device, base._refusal)
        result = func(*tree_map(_plain, args), **tree_map(_plain, kwargs))
        if func.is_view and isinstance(base, PackedTensor):
            refusal = base._refusal
            return tree_map(lambda x: cls(lambda: x, x, x.device, refusal) if isinstance(x, Tensor) else x, result)
        return result

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "requires_grad" or value:
            raise RuntimeError(self._refusal)

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        return self.detach()

    def requires_grad_(self, requires_grad: bool = True) -> Tensor:
        if requires_grad:
            raise RuntimeError(self._refusal)
        return self

    def numpy(self, *, force: bool = False) -> Any:
        array = self._read().numpy(force=force)
        array.flags.writeable = False
        return array

    def tolist(self) -> Any:
        return self._read().tolist()

    def __repr__(self, **kwargs: Any) -> str:  # type: ignore[override]
        return f"PackedTensor({self._read()!r})"

    def __deepcopy__(self, memo: Any) -> Tensor:
        return self._read().clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._read().__reduce_ex__(protocol)

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(self._refusal)

    # These write, or allow writes, without dispatching an operation.
    apply_ = map_ = map2_ = share_memory_ = storage = data_ptr = __dlpack__ = _refuse


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[PackedTensor]:
    """The packed tensors that an operation writes to."""
    for position, argument in enumerate(schema(func).arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            yield from (leaf for leaf in tree_leaves(value) if isinstance(leaf, PackedTensor))


def _plain(x: Any) -> Any:
    return x._read() if isinstance(x, PackedTensor) else x


class PackedGuard(nn.Parameter):
    """An empty parameter that represents a packed weight among a model's parameters and cannot be made trainable.

    Without it, ``requires_grad_(True)`` on a module, as in PEFT's ``modules_to_save``, would train biases only.
    """

    _refusal = "a packed weight cannot be trained; call octav_hf.unpack_octav(model) first"  # for copies

    @classmethod
    def of(cls, name: str, like: Tensor, device: torch.device) -> "PackedGuard":
        """The guard on ``device`` of the weight ``name``, with shape and dtype of ``like``."""
        guard = cls(torch.zeros(0, dtype=like.dtype, device=device), False)
        guard.__dict__["_refusal"] = packed_message(name, like.shape, "cannot be trained")
        return guard

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "requires_grad" and value:
            raise RuntimeError(self._refusal)
        super().__setattr__(name, value)

    def requires_grad_(self, requires_grad: bool = True) -> Tensor:
        if requires_grad:
            raise RuntimeError(self._refusal)
        return self
