"""A weight stored as integers and one scale per row or group; it replaces the weight's quantizer."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .._utils.torch_private import own_parameters, set_own_parameters
from ..functional.bit_packing import pack_bits, packed_row_bytes, unpack_bits
from ..functional.fake_quantize import fake_quantize
from ..functional.grid import step_size
from ..functional.groups import Groups
from ..functional.rows import Sign, statistics_dtype, to_rows
from .fake_quantize import FakeQuantize
from .packed_tensor import PackedGuard, PackedTensor, packed_message
from .recording import refuse_recording

_GUARD = "guarded_weight"


class PackedWeight(FakeQuantize):
    """A quantized weight as packed integers and one step per row or group; replaces the ``weight_quantizer``.

    Its buffers are on the meta device until values are packed or loaded.

    Args:
        quantizer: the weight's quantizer, whose settings are copied.
        weight: the weight, for its shape, dtype and ``requires_grad``; its values are not read.
        is_frozen: whether clips stay frozen after unpacking.

    Attributes:
        packed_data: buffer, ``[rows * bytes per row]``, see ``functional.bit_packing``. One-dimensional, so that it
            cannot be confused with a float weight, which has at least two dimensions.
        scale: buffer, ``[rows]`` (one row if the whole tensor shares a clip) or ``[rows, groups]``; float32, or float64
            for a float64 weight, whatever the dtype of the model, so that the values are bit for bit those of training.
            Float16 would save 0.25 of the 4.5 bits of a 4-bit weight with groups of 64 (0.5 of 5 with groups of 32),
            but change 85 % of the weights, by up to 2^-11 of their magnitude.
        shape, dtype: of the dequantized weight; ``dtype`` follows that of the model.
        is_trainable: whether the weight required a gradient when it was packed.
    """

    packed_data: Tensor
    scale: Tensor
    on_change: Callable[[], None] | None = None  # called when the weight was moved or loaded; copies have none
    _left_by_calls = (*FakeQuantize._left_by_calls, "on_change")

    def __init__(self, quantizer: FakeQuantize, weight: Tensor, is_frozen: bool):
        super().__init__(**quantizer.init_kwargs)
        self.shape = weight.shape
        self.dtype = weight.dtype
        self.is_trainable = weight.requires_grad
        self._is_frozen = is_frozen
        rows, self._row_length = self._to_rows(weight).shape
        groups = () if self.group_size is None else (-(-self._row_length // self.group_size),)
        size = rows * packed_row_bytes(self._row_length, self.num_bits)
        packed_dtype = torch.int8 if self.num_bits == 8 else torch.uint8
        self.register_buffer("packed_data", torch.empty(size, dtype=packed_dtype, device="meta"))
        self.register_buffer("scale", torch.empty(rows, *groups, dtype=statistics_dtype(weight.dtype), device="meta"))

    @property
    def is_frozen(self) -> bool:
        """Whether the weight's clips were frozen when it was packed."""
        return self._is_frozen

    @classmethod
    @torch.no_grad()
    def pack(cls, quantizer: FakeQuantize, weight: Tensor) -> "PackedWeight":
        """Pack ``quantizer(weight)`` without loss; ``ValueError`` if ``weight`` holds NaN or Inf."""
        packed = cls(quantizer, weight, is_frozen=quantizer.is_frozen)
        weight = weight.detach()
        clip = quantizer.compute_clip(weight)
        groups = quantizer.active_groups
        quantized = fake_quantize(weight, clip, quantizer.num_bits, groups=groups)
        step = step_size(clip.to(packed.scale.dtype), quantizer.num_bits, signed=True)
        of_elements = step if groups is None else groups.of_elements(step, weight)
        # round() removes rounding errors, which are far below 0.5.
        levels = (quantized.to(step.dtype) / torch.where(of_elements > 0, of_elements, 1)).round().to(torch.int8)
        packed.packed_data = pack_bits(packed._to_rows(levels).contiguous(), quantizer.num_bits).flatten()
        packed.scale = packed._scale_of(step)
        if not torch.equal(packed.dequantize(), quantized):
            raise ArithmeticError(
                f"{quantizer.name}: integers and scales do not reproduce the quantized weight of shape "
                f"{tuple(weight.shape)} exactly"
            )
        packed.guard()
        return packed

    @property
    def tensor(self) -> Tensor:
        """The weight as a ``PackedTensor``; while compiling, plain dequantized values, which are dropped if unused."""
        if torch.compiler.is_compiling():
            return self.dequantize()
        like = torch.empty(self.shape, dtype=self.dtype, device="meta")
        refusal = packed_message(self.name, self.shape, "can only be read")
        tensor = PackedTensor(self.dequantize, like, self.packed_data.device, refusal)
        tensor.__dict__.update(self.packed_data.__dict__)  # such as Transformers' flag of loaded weights
        return tensor

    def guard(self) -> None:
        """Register the ``PackedGuard``; called once the weight has values."""
        like = torch.empty(self.shape, dtype=self.dtype, device="meta")
        self.register_parameter(_GUARD, PackedGuard.of(self.name, like, self.packed_data.device))

    def forward(self, x: Tensor, call_index: int = 0, codes: torch.dtype | None = None, known: Any = None) -> Any:
        """The weight if ``x`` is ``tensor``; its rows if ``x`` holds indices. ``RuntimeError`` while being traced."""
        refuse_recording(self, x, dynamic=False)
        if not x.is_floating_point():
            return self.dequantize_rows(x)
        return self.dequantize() if isinstance(x, PackedTensor) else x

    def compute_clip(self, x: Tensor, signed: Sign | None = None, skip: Tensor | None = None) -> Tensor:
        """The clips with which the weight was packed, in the shape of the clipping rule; ``x`` is not read."""
        clip = self.scale / step_size(torch.ones_like(self.scale), self.num_bits, signed=True)
        if self.dim is None:
            return clip.reshape(())
        if self.group_size is not None:
            (dim,) = self._along_a_row
            sizes = [size for d, size in enumerate(self.shape) if d != dim]
            return clip.view(*sizes, -1).movedim(-1, dim).unsqueeze(dim + 1)
        return clip.view([1 if d in self._along_a_row else size for d, size in enumerate(self.shape)])

    def dequantize(self) -> Tensor:
        """The weight with ``shape`` and ``dtype``, contiguous."""
        return self._shaped(self._values(self._packed_rows, self.scale))

    def integers(self) -> Tensor:
        """The integers of the weight, int8 with ``shape``, contiguous."""
        return self._shaped(unpack_bits(self._packed_rows, self.num_bits, self._row_length))

    def _shaped(self, rows: Tensor) -> Tensor:
        order = [d for d in range(len(self.shape)) if d not in self._along_a_row] + self._along_a_row
        inverse = sorted(order, key=order.__getitem__)
        return rows.reshape([self.shape[d] for d in order]).permute(inverse).contiguous()

    def dequantize_rows(self, index: Tensor) -> Tensor:
        """Rows of a weight with one scale per index of its first dimension: ``[*index.shape, row]``."""
        return self._values(self._packed_rows[index], self.scale[index])

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, packed {list(self.shape)} {self.dtype}"

    def _values(self, packed: Tensor, scale: Tensor) -> Tensor:
        levels = unpack_bits(packed, self.num_bits, self._row_length)
        dtype = torch.promote_types(scale.dtype, self.dtype)
        scale = scale.to(dtype).unsqueeze(-1)
        if self.group_size is not None:
            scale = Groups(self.group_size, -1).of_elements(scale, levels)
        return (levels.to(dtype) * scale).to(self.dtype)

    def _scale_of(self, step: Tensor) -> Tensor:
        """Reshape the steps of the grid from the shape of the clipping rule to that of ``scale``."""
        if self.group_size is None:
            return step.flatten()
        (dim,) = self._along_a_row
        return step.squeeze(dim + 1).movedim(dim, -1).reshape(self.scale.shape)

    @property
    def _packed_rows(self) -> Tensor:
        return self.packed_data.view(len(self.scale), packed_row_bytes(self._row_length, self.num_bits))

    @property
    def _along_a_row(self) -> list[int]:
        """The dimensions of the weight whose elements share a scale, or a row of groups."""
        if self.dim is None:
            return list(range(len(self.shape)))
        return sorted(d % len(self.shape) for d in ((self.dim,) if isinstance(self.dim, int) else self.dim))

    def _to_rows(self, weight: Tensor) -> Tensor:
        return weight.reshape(1, -1) if self.dim is None else to_rows(weight, self.dim)[0]

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """Yields nothing. Parent modules list the guard, but nothing of it has to be moved or sharded."""
        return iter(())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.scale.device)).dtype
        super()._apply(fn, recurse)
        self._changed()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._renew_guard()

    def _renew_guard(self) -> None:
        """Restore the guard, which copying, pickling or moving turns into a plain parameter."""
        if own_parameters(self):
            self.guard()

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        with self._without_guard():
            super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        with self._without_guard():
            super()._load_from_state_dict(*args, **kwargs)
        self._changed()  # assign=True may move the weight from the meta device

    def _changed(self) -> None:
        self._renew_guard()
        if self.on_change is not None:
            self.on_change()

    @contextmanager
    def _without_guard(self) -> Iterator[None]:
        parameters = own_parameters(self)
        set_own_parameters(self, {})
        try:
            yield
        finally:
            set_own_parameters(self, parameters)
