"""The quantizer of a weight, which caches its clips in training until the weight changes."""

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from .._utils.torch_private import storage_id, storage_reference, version_counter
from ..functional.rows import Dim, Sign, to_rows
from .codes import Grid
from .fake_quantize import FakeQuantize
from .frozen_clips import FrozenClips

_optimizer_steps = 0


def _count_step(*_: object) -> None:
    global _optimizer_steps
    # A compiled step would be recompiled for each count; its writes increase the version counter instead.
    if not torch.compiler.is_compiling():
        _optimizer_steps += 1


register_optimizer_step_post_hook(_count_step)


class WeightFakeQuantize(FakeQuantize):
    """``FakeQuantize`` for a weight ``[rows, ...]`` that caches its clips in training until the weight changes.

    Frozen ``clips`` have the shape that the clipping rule returns for the weight: ``[rows, 1, ...]``, ``[]`` for one
    clip, or ``[rows, groups, 1]``.

    In training mode with gradients enabled, the clips of an ``nn.Parameter`` are cached until one of these happens: its
    version counter, its storage or the settings change; a PyTorch optimizer makes a step (FSDP2 and DeepSpeed write to
    weights without changing the version counter); ``train()`` or ``eval()`` changes the mode. Clips are computed at
    every call in evaluation mode and under ``no_grad``, where weights are merged and averaged; for a weight that is not
    a parameter, such as a parametrized one; and in compiled graphs and CUDA graphs. Deciding this reads no values.

    A write to ``weight.data`` between two forward passes in training is therefore missed, unless it changes the storage
    or an optimizer step or a change of mode follows. Write to the weight itself instead, under ``torch.no_grad()``.
    """

    _kept: tuple[weakref.ref[Tensor], Any, tuple[Any, ...], Tensor] | None = None
    _left_by_calls = (*FakeQuantize._left_by_calls, "_kept")

    # The backward pass saves the buffer, so it must not be an inference tensor.
    @torch.inference_mode(False)
    @torch.no_grad()
    def freeze_at(self, weight: Tensor) -> None:
        """Freeze the clips at those of ``weight``; ``ValueError`` if it holds NaN or Inf."""
        self.freeze(FrozenClips(True, self.dynamic_clips(weight.detach()).clone()))

    def frozen_problem(self, frozen: FrozenClips, weight_shape: tuple[int, ...], max_calls: int | None) -> str:
        weight = torch.empty(weight_shape, dtype=torch.float32, device="meta")
        groups = self.active_groups
        shape = to_rows(weight, self.dim)[1] if groups is None else groups.shape_of_clips(weight)
        if frozen.signed and frozen.offset is None and tuple(frozen.clips.shape) == shape:
            return ""
        return (
            f"have the shape {tuple(frozen.clips.shape)}, signed={frozen.signed}, but its weight of shape "
            f"{tuple(weight_shape)} needs signed clips of shape {shape}, without an offset"
        )

    @property
    def _sharing(self) -> tuple[Dim, int | None]:
        return self.dim, self.group_size

    def compute_clip(self, x: Tensor, signed: Sign | None = None, skip: Tensor | None = None) -> Tensor:
        """The frozen clips if there are any, otherwise those of ``x``."""
        frozen = self._buffers["clips"]
        return self.dynamic_clips(x) if frozen is None else frozen

    def _frozen_grid(self, frozen: FrozenClips, x: Tensor, call_index: int) -> Grid:
        return Grid(True, frozen.clips)

    def dynamic_clips(self, x: Tensor) -> Tensor:
        """The clips of ``x``, even if clips are frozen."""
        if not (_can_keep(x) and self.training):
            return super().compute_clip(x)
        settings = self.num_bits, self.clip, self.signed, *self._sharing, dict(self.clip_options)
        state = version_counter(x), storage_id(x), x.data_ptr(), x.dtype, _optimizer_steps, settings
        kept = self._kept
        if kept is not None and kept[0]() is x and kept[2] == state:
            return kept[3]
        clip = super().compute_clip(x)
        self._kept = weakref.ref(x), storage_reference(x), state, clip
        return clip

    def forget(self) -> None:
        super().forget()
        self._kept = None

    def train(self, mode: bool = True) -> Any:
        """As in ``nn.Module``; a change of the mode drops the cached clips."""
        if mode != self.training:
            self._kept = None
        return super().train(mode)


def _can_keep(x: Tensor) -> bool:
    """Whether ``dynamic_clips`` can detect changes of ``x``, so that its clips may be cached."""
    return (
        not torch.compiler.is_compiling()
        and type(x) is nn.Parameter  # not a subclass or a fake tensor
        and torch.is_grad_enabled()
        and not torch.is_inference_mode_enabled()
        and not x.is_inference()
        # A CUDA graph must compute the clips of the weight at replay.
        and not (x.is_cuda and torch.cuda.is_current_stream_capturing())
    )
