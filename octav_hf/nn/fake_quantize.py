"""The quantizer module: a grid, a clipping rule and a gradient estimator."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..functional import fake_quantize, fake_quantize_learned_clip, integer_range
from ..functional.groups import Groups
from ..functional.registry import clip_for_sign, takes_skip
from ..functional.rows import Dim, Sign, has_negative, minus_offset, statistics_dtype
from .clip_observer import ClipObserver
from .codes import Codes, Grid
from .frozen_clips import FrozenClips, values_key
from .full_precision_buffers import FullPrecisionBuffers
from .function_modes import outside_function_modes
from .nan_flag import NanFlag
from .recording import refuse_recording

FROZEN_BUFFERS = ("clips", "unsigned_clips", "offset")
"""Names of the buffers of frozen clips."""

FROZEN_TENSORS = (*FROZEN_BUFFERS, "clip_correction")
"""Names of these buffers, and of the parameter of learned clips."""

_MAX_PARTS = 2  # maximum number of dimensions of granular clips: heads and channels


class FakeQuantize(NanFlag, FullPrecisionBuffers):
    """Quantizes one operand with a dynamic clip, computed from the data at every call, or with a frozen clip.

    Dynamic clips are recomputed, never stored. Frozen clips are buffers that exist only while clips are frozen. There
    are two of them, ``clips`` and ``unsigned_clips``; which one is set gives the sign of the grid, so that no value has
    to be read. With frozen clips, NaN stays NaN, without an error. With dynamic clips, NaN and Inf raise an error on
    the CPU in eager mode; elsewhere, clip and result are NaN, and ``octav_hf.check_finite`` raises the error.

    Args:
        num_bits: 2 to 8.
        clip: name of a clipping rule in ``functional.CLIP_RULES``.
        clip_options: further keyword arguments of the rule.
        gradient_estimator: ``"ste"``, ``"pwl"`` or ``"mad"``; see ``functional.fake_quantize``.
        signed: ``True`` for the two's-complement grid, ``False`` for the unsigned one; ``None`` to decide at every
            call: unsigned for a tensor without negative values.
        asymmetric: whether a tensor whose negative values all lie inside its signed clip, such as the output of a GELU,
            is quantized on the unsigned grid that begins at its lowest value m, ``m + Q(x - m)``; requires
            ``signed=None``. A tensor with long tails on both sides stays on the signed grid.
        dim: dimension(s) whose elements share a clip; ``None`` for one clip for the whole tensor.
        frozen_dim: the same for frozen clips, as negative dimensions; also used while an observer is set. All samples
            share frozen clips. A scalar frozen clip ignores ``frozen_dim``.
        group_size: split the last of the dimension(s) ``dim`` into groups of this size, each with its own clip; see
            ``functional.groups.Groups``. ``None`` for no groups.
        frozen_group_size: the same for frozen clips; requires ``frozen_dim=None``, so that tokens share the clips.
        name: name of the operand in the model, for error messages.

    Attributes:
        clips, unsigned_clips: frozen clips of the signed and of the unsigned grid, ``[calls, *parts]``; one of them is
            ``None``. There is one clip per matmul of the operand in one forward pass of its module, and per part: parts
            are none, groups, heads, or heads and channels. float32, or float64 for float64 data, whatever the dtype of
            the model.
        offset: lowest value of an asymmetric grid with frozen clips, ``[]``, negative.
        clip_correction: parameter of learned clips, with shape and dtype of the clips, which are multiplied by
            ``exp(128 clip_correction)``; ``None`` if clips are not learned.
        observer: if set, it observes every call, and clips are dynamic even if frozen clips exist.
    """

    num_bits: int
    clip: str
    clip_options: dict[str, Any]
    gradient_estimator: str
    signed: bool | None
    asymmetric: bool
    dim: Dim
    frozen_dim: tuple[int, ...] | None
    group_size: int | None
    frozen_group_size: int | None
    name: str
    clips: Tensor | None
    unsigned_clips: Tensor | None
    offset: Tensor | None
    clip_correction: nn.Parameter | None
    observer: ClipObserver | None = None
    is_synchronized: ClassVar[bool] = False  # whether clips are computed over all ranks
    _left_by_calls: ClassVar[tuple[str, ...]] = ("_sum_of_clips",)

    def __init__(
        self,
        num_bits: int,
        *,
        clip: str = "octav",
        clip_options: Mapping[str, Any] | None = None,
        gradient_estimator: str = "mad",
        signed: bool | None = True,
        asymmetric: bool = False,
        dim: Dim = None,
        frozen_dim: tuple[int, ...] | None = None,
        group_size: int | None = None,
        frozen_group_size: int | None = None,
        name: str = "",
    ):
        super().__init__()
        # Bypasses nn.Module.__setattr__, which would check whether each value is a parameter, buffer or module.
        self.__dict__.update(
            num_bits=num_bits,
            clip=clip,
            clip_options=dict(clip_options or {}),
            gradient_estimator=str(gradient_estimator),
            signed=signed,
            asymmetric=asymmetric,
            dim=dim,
            frozen_dim=frozen_dim,
            group_size=group_size,
            frozen_group_size=frozen_group_size,
            name=name,
        )
        self.unfreeze()

    @property
    def init_kwargs(self) -> dict[str, Any]:
        """The constructor's arguments, from which a quantizer with the same settings and dynamic clips can be made."""
        return {name: getattr(self, name) for name in _INIT_KWARGS}

    @property
    def frozen(self) -> FrozenClips | None:
        """The frozen clips, with the learned correction applied; ``None`` if clips are dynamic."""
        frozen = self._frozen
        return None if frozen is None else frozen.corrected

    @property
    def _frozen(self) -> FrozenClips | None:
        """The frozen clips as stored, without the correction applied."""
        buffers, correction = self._buffers, self.clip_correction  # no parameter in a replica of nn.DataParallel
        clips, unsigned_clips = buffers["clips"], buffers["unsigned_clips"]
        if clips is not None:
            return FrozenClips(True, clips, None, correction)
        return None if unsigned_clips is None else FrozenClips(False, unsigned_clips, buffers["offset"], correction)

    def freeze(self, frozen: FrozenClips) -> None:
        """Freeze the clips. The tensors become buffers without a copy, and a correction becomes a parameter."""
        self.register_buffer("clips", frozen.clips if frozen.signed else None)
        self.register_buffer("unsigned_clips", None if frozen.signed else frozen.clips)
        self.register_buffer("offset", frozen.offset)
        correction = frozen.correction
        if correction is not None and not isinstance(correction, nn.Parameter):
            correction = nn.Parameter(correction)
        self.register_parameter("clip_correction", correction)

    def unfreeze(self) -> None:
        """Make clips dynamic."""
        for name in FROZEN_BUFFERS:
            self.register_buffer(name, None)
        self.register_parameter("clip_correction", None)

    @property
    def is_frozen(self) -> bool:
        """Whether it has frozen clips."""
        return self._frozen is not None

    def frozen_problem(self, frozen: FrozenClips, weight_shape: tuple[int, ...], max_calls: int | None) -> str:
        """Why clips of this form cannot be frozen in this quantizer; empty if they can. Reads no values.

        Args:
            frozen: clips to freeze.
            weight_shape: shape of the weight, for the quantizer of a weight.
            max_calls: maximum number of matmuls of the operand per forward pass, ``None`` for any number.
        """
        signs = (True, False) if self.signed is None else (self.signed,)
        if frozen.signed not in signs:
            allowed = f"{'' if self.signed else 'un'}signed_activations"
            return f"are of the {'' if frozen.signed else 'un'}signed grid, which this operand never has ({allowed})"
        if frozen.offset is not None and (frozen.signed or not self.asymmetric or frozen.offset.dim()):
            return "have an offset, but this operand has no asymmetric grid (asymmetric_activations)"
        calls, *parts = frozen.clips.shape or (0,)
        dims = range(1, _MAX_PARTS + 1) if self.frozen_dim else () if self.frozen_group_size is None else (1,)
        if not calls or (parts and len(parts) not in dims) or (max_calls is not None and calls > max_calls):
            expected = "[calls, *parts]" if dims else "[calls], since it has one clip for the tensor"
            return f"have the shape {tuple(frozen.clips.shape)}, which must be {expected}"
        return ""

    @property
    def cache_key(self) -> tuple[Any, ...]:
        """Everything that the result depends on besides the input; quantizers with equal keys give equal results."""
        # A quantizer that is observed or learned must be called itself, so its key equals no other.
        learning = self.clip_correction is not None and self
        state = self.observer or learning or tuple(map(values_key, (self.clips, self.unsigned_clips, self.offset)))
        return (*(getattr(self, name) for name in _INIT_KWARGS if name != "name"), state)

    @property
    def active_frozen_clips(self) -> FrozenClips | None:
        """The frozen clips if the next call uses them; ``None`` if it computes dynamic clips."""
        return self._frozen if self.observer is None else None

    @property
    def is_static(self) -> bool:
        """Whether the grid of the next call does not depend on its operand: frozen, one clip for the whole tensor."""
        frozen = self.active_frozen_clips
        return frozen is not None and frozen.clips.dim() == 1

    @property
    def active_dim(self) -> Dim:
        """The dimension(s) whose elements, or groups of elements, share a clip at the next call."""
        return self._sharing[0]

    @property
    def active_groups(self) -> Groups | None:
        """The groups of the next call; ``None`` if it has none."""
        dim, size = self._sharing
        return None if size is None else Groups(size, dim)

    @property
    def is_granular(self) -> bool:
        """Whether the next call has more than one clip per tensor."""
        return self._sharing != (None, None)

    @property
    def _sharing(self) -> tuple[Dim, int | None]:
        """``dim`` and ``group_size`` of the next call."""
        if self.observer is not None:
            return self.frozen_dim, self.frozen_group_size
        frozen = self._frozen
        if frozen is not None:
            return (self.frozen_dim, self.frozen_group_size) if frozen.clips.dim() > 1 else (None, None)
        return self.dim, self.group_size

    def is_signed(self, x: Tensor) -> Sign:
        """Whether ``x`` is quantized on the signed grid; a bool tensor ``[]`` if it depends on the values."""
        if self.signed is not None or x.is_complex():  # complex numbers have no order; the clipping rule refuses them
            return self.signed is not False
        return has_negative(x)

    @outside_function_modes
    def compute_clip(self, x: Tensor, signed: Sign | None = None, skip: Tensor | None = None) -> Tensor:
        """Clipping scalar(s) of ``x``, broadcastable against it or its groups. Errors of the rule contain ``name``.

        Args:
            x: floating point, any shape.
            signed: ``is_signed(x)``, if it is known already.
            skip: bool ``[]``; if true, the result is unspecified and ``x`` may not be read.
        """
        signed = self.is_signed(x) if signed is None else signed
        if torch.compiler.is_compiling():  # the rule raises no error about values, so no try block to trace
            clip = self._clip(x, signed, skip)
        else:
            try:
                clip = self._clip(x, signed, skip)
            except (ValueError, TypeError) as error:
                raise type(error)(f"{self.name or 'FakeQuantize'}: {error}") from error
        self.remember(clip)
        return clip

    def _clip(self, x: Tensor, signed: Sign, skip: Tensor | None) -> Tensor:
        def rule(x: Tensor, dim: Dim) -> Tensor:
            return clip_for_sign(self.clip, x, self.num_bits, signed=signed, dim=dim, skip=skip, **self.clip_options)

        dim, size = self._sharing
        if size is None:
            return rule(x, dim)
        if dim is None:  # observed clips of groups: all tokens share them, but each sample has its own
            dim = tuple(range(1 if x.dim() > 2 else 0, x.dim()))
        return Groups(size, dim).clips(x, rule)

    def grid_of(self, x: Tensor, call_index: int = 0) -> Grid:
        """The grid that ``forward`` rounds ``x`` to; arguments and errors are those of ``forward``."""
        frozen = self.active_frozen_clips
        return self.dynamic_grid(x) if frozen is None else self._frozen_grid(frozen, x, call_index)

    @outside_function_modes
    def dynamic_grid(self, x: Tensor) -> Grid:
        """The grid for ``x``, computed from its values without reading them on the host."""
        if self.asymmetric and self.signed is None and x.is_floating_point():
            return self._grid_of_three(x)
        signed = self.is_signed(x)
        return Grid(signed, self.compute_clip(x, signed))

    @torch.no_grad()
    def _grid_of_three(self, x: Tensor) -> Grid:
        """Signed, unsigned or asymmetric grid; asymmetric if the lowest value is inside the mean signed clip."""
        low = _lowest(x)
        negative = low < 0
        clip = self.compute_clip(x, negative)
        shifted = negative & (-low <= clip.mean())
        stays = shifted.logical_not()
        offset = torch.where(shifted, low, 0.0)
        skip = stays if takes_skip(self.clip) else torch.zeros_like(stays)
        clip_from_offset = self.compute_clip(minus_offset(x, offset, skip), False, skip=skip)
        return Grid(negative & stays, torch.where(shifted, clip_from_offset, clip), offset)

    def forward(self, x: Tensor, call_index: int = 0, codes: torch.dtype | None = None, known: Any = None) -> Any:
        """Quantize and dequantize ``x``; the result has the same shape and dtype.

        Args:
            x: floating point, any shape; ``[batch, ..., *dim]`` if clips are granular.
            call_index: index of this matmul of the operand in one forward pass of its module. Each has its own frozen
                clip.
            codes: if given, return ``Codes`` of this dtype instead.
            known: the result, if a quantizer with the same ``cache_key`` has already computed it for ``x``; it is
                returned as it is, and forward hooks run as usual.

        Raises:
            ValueError: ``x`` has no clip, or needs frozen clips of another shape; the message contains ``name``.
            RuntimeError: the call is recorded by ``torch.jit.trace`` or ``torch.fx``, or by ``torch.export`` with a
                dynamic clip; or codes are requested for an ``x`` that requires a gradient.
        """
        if known is not None:
            return known
        frozen = self.active_frozen_clips
        refuse_recording(self, x, dynamic=frozen is None)
        grid = self.grid_of(x, call_index)
        if self.observer is not None:
            self.observer.observe(x, call_index, grid)
        if codes is None:
            return self._round(x, grid, learns=frozen is not None and grid.clip.requires_grad)
        if self.active_groups is not None:
            raise NotImplementedError(
                f"{self.name or 'FakeQuantize'}: integer matmuls do not support groups, and the operand of shape "
                f"{tuple(x.shape)} has clips for groups of {self.active_groups.size}; call octav_hf.unpack_octav(model)"
            )
        if torch.is_grad_enabled() and x.requires_grad:
            raise RuntimeError(
                f"{self.name or 'FakeQuantize'}: integers have no gradient, and the operand of shape {tuple(x.shape)} "
                "requires one; run the model under torch.no_grad(), or call octav_hf.unpack_octav(model) to train it"
            )
        return Codes.of(x, grid, self.num_bits, codes)

    def _round(self, x: Tensor, grid: Grid, learns: bool) -> Tensor:
        arguments: dict[str, Any] = {
            "signed": grid.signed,
            "offset": grid.offset,
            "gradient": self.gradient_estimator,
        }
        groups = self.active_groups
        if not learns:
            return fake_quantize(x, grid.clip, self.num_bits, groups=groups, **arguments)

        def quantize(part: Tensor, clip: Tensor) -> Tensor:
            return fake_quantize_learned_clip(part, clip, self.num_bits, **arguments)

        return quantize(x, grid.clip) if groups is None else groups.map(x, grid.clip, quantize)

    def _frozen_grid(self, frozen: FrozenClips, x: Tensor, call_index: int) -> Grid:
        dtype, parts = statistics_dtype(x.dtype), tuple(frozen.clips.shape[1:])
        if parts and parts != self.parts_of(x):
            raise ValueError(
                f"{self.name or 'FakeQuantize'}: its frozen clips have the shape {parts}, but its operand of shape "
                f"{tuple(x.shape)} (batch first, dimensions that share a clip last) needs clips of shape "
                f"{self.parts_of(x)}; run the model as it was calibrated, or call calibrate_octav again"
            )
        clip = frozen.clip_of(call_index).to(dtype)
        if parts:
            clip = clip[(..., *(None for _ in self.frozen_dim or (-1,)))]
        return Grid(frozen.signed, clip, None if frozen.offset is None else frozen.offset.to(dtype))

    def parts_of(self, x: Tensor) -> tuple[int, ...]:
        """Shape of the frozen clips of ``x``, which all samples share."""
        if self.frozen_dim is None:
            size = self.frozen_group_size
            return () if size is None else (-(-x.shape[-1] // size),)
        kept = tuple(x.shape[: x.dim() - len(self.frozen_dim)])
        return kept[1:] if x.dim() > 2 else kept

    def __getstate__(self) -> dict[str, Any]:
        """The state to pickle and copy: without what calls store, so that a hash of the model does not depend on it."""
        return {name: value for name, value in self.__dict__.items() if name not in self._left_by_calls}

    def extra_repr(self) -> str:
        frozen = self._frozen
        sign = self.signed if frozen is None else frozen.signed
        signs = (True, False) if sign is None else (sign,)
        grid = " or ".join(str(list(integer_range(self.num_bits, signed))) for signed in signs)
        if frozen is not None and frozen.offset is not None:
            grid += " from an offset on"
        elif frozen is None and self.asymmetric:
            grid += " or asymmetric"
        scalars = "per tensor" if self.dim is None else f"over dim {self.dim}"
        if self.group_size is not None:
            scalars += f" in groups of {self.group_size}"
        state = "" if frozen is None else f" frozen, {list(frozen.clips.shape)}"
        state += "" if self.clip_correction is None else " that learn"
        return (
            f"{self.num_bits} bits {grid}, clip={self.clip} {scalars}{state}, "
            f"gradient_estimator={self.gradient_estimator}"
        )


_INIT_KWARGS = ("num_bits", *(FakeQuantize.__init__.__kwdefaults__ or ()))


def _lowest(x: Tensor) -> Tensor:
    """The lowest value of ``x``, ``[]``, in the dtype of clips; 0 if it is empty."""
    dtype = statistics_dtype(x.dtype)
    return x.amin().to(dtype) if x.numel() else torch.zeros((), dtype=dtype, device=x.device)
