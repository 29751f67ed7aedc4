"""The quantizer of a weight, which computes clips once for each value of the weight in training."""

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
    # A compiled step would be compiled anew for each count; the writes in it raise the version counter.
    if not torch.compiler.is_compiling():
        _optimizer_steps += 1


register_optimizer_step_post_hook(_count_step)


class WeightFakeQuantize(FakeQuantize):
    """``FakeQuantize`` for a weight ``[rows, ...]`` that keeps its clips from one training step to the next change.

    Frozen ``clips`` are as the clipping rule gives them for the weight: ``[rows, 1, ...]``, 0-dim for one, or
    ``[rows, groups, 1]``.

    In training mode and grad mode the clips of an ``nn.Parameter`` are kept until its version counter, its storage or
    these settings change, an optimizer of PyTorch makes a step (some write to weights without raising the version
    counter, as FSDP2 and DeepSpeed do), or ``train()`` and ``eval()`` change the mode. They are computed at every call
    in evaluation mode and without grad mode, in which weights are merged and averaged, for a weight that is no
    parameter, such as a parametrized one, and in compiled graphs and CUDA graphs. No value is read to find out.

    So a write to ``weight.data`` is missed if it comes between two forward passes in training and grad mode, keeps the
    storage, and neither an optimizer step nor a change of mode comes between them. Write to the weight itself, under
    ``torch.no_grad()``.
    """

    _kept: tuple[weakref.ref[Tensor], Any, tuple[Any, ...], Tensor] | None = None
    _left_by_calls = (*FakeQuantize._left_by_calls, "_kept")

    # As clips computed under inference mode; a buffer is saved for the backward pass, too.
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
            f"have the shape {tuple(frozen.clips.shape)}, or are not of the signed grid, and its weight of shape "
            f"{tuple(weight_shape)} needs clips of shape {shape}"
        )

    @property
    def _sharing(self) -> tuple[Dim, int | None]:
        return self.dim, self.group_size

    def compute_clip(self, x: Tensor, signed: Sign | None = None, skip: Tensor | None = None) -> Tensor:
        """The frozen clips if there are, else those of ``x``."""
        frozen = self._buffers["clips"]
        return self.dynamic_clips(x) if frozen is None else frozen

    def _frozen_grid(self, frozen: FrozenClips, x: Tensor, call_index: int) -> Grid:
        return Grid(True, frozen.clips)

    def dynamic_clips(self, x: Tensor) -> Tensor:
        """The clips of ``x``, whether clips are frozen or not."""
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
        """As in ``nn.Module``; a change of the mode drops the clips that are kept."""
        if mode != self.training:
            self._kept = None
        return super().train(mode)


def _can_keep(x: Tensor) -> bool:
    """Whether what ``dynamic_clips`` compares tells if ``x`` has changed, and its clips may be used later."""
    return (
        not torch.compiler.is_compiling()
        and type(x) is nn.Parameter  # and no tensor of another type, fake ones included
        and torch.is_grad_enabled()
        and not torch.is_inference_mode_enabled()
        and not x.is_inference()
        # The graph is to compute the clips of the weight as it is when it runs.
        and not (x.is_cuda and torch.cuda.is_current_stream_capturing())
    )
