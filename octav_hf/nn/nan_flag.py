"""Record on the device that a quantizer met NaN or Inf; the error is raised where the host synchronizes anyway."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._utils.torch_private import has_values
from ..functional.kernels.operations import operation


def _zero_like(x: Tensor) -> Tensor:
    return x.new_zeros((), dtype=torch.float32)


@operation("(Tensor x) -> Tensor", _zero_like)
def empty_sum(x: Tensor) -> Tensor:
    """A new zero, float32 ``[]``, on the device of ``x``.

    A compiler would fold a constant zero into the first addition. Quantizers of the same input have equal sums, and
    would then share one tensor, which the next compilation refuses to modify.
    """
    return _zero_like(x)


class NanFlag(nn.Module):
    """Mixin of modules that compute clips: records whether a clip was NaN, without a read by the host.

    On the CPU in eager mode, a clipping rule raises an error at once. On other devices and in compiled graphs, the clip
    of a tensor with NaN or Inf is NaN. Each clip is added to a sum on the device, which stays NaN from then on; this
    takes one operation per clip. The sum is not a buffer, because it is not part of the model: state dicts and pickles
    do not contain it, and ``DistributedDataParallel`` does not broadcast it.
    """

    _sum_of_clips: Tensor  # [], float32

    @torch.inference_mode(False)
    def __init__(self) -> None:
        super().__init__()
        self._sum_of_clips = torch.zeros((), dtype=torch.float32, device="cpu")

    def remember(self, clip: Tensor) -> None:
        """Record whether ``clip``, of any shape, contains NaN."""
        device = clip.device
        if not torch.compiler.is_compiling() and device.type in ("cpu", "meta"):
            return
        if self._sum_of_clips.device != device:
            self.start_on(clip)
        with torch.no_grad():
            self._sum_of_clips.add_(clip if clip.dim() == 0 else clip.sum())

    def forget(self) -> None:
        """Clear the record, and cached clips, which would otherwise be reused without being recorded."""
        self._make_writable()
        self._sum_of_clips.zero_()  # in place, because a CUDA graph adds to this tensor

    def train(self, mode: bool = True) -> Any:
        """As in ``nn.Module``."""
        self._make_writable()
        return super().train(mode)

    # Training cannot write to an inference tensor.
    @torch.inference_mode(False)
    def start_on(self, like: Tensor) -> None:
        """Start an empty record on the device of ``like``. A compiled graph that does it is compiled again."""
        self._sum_of_clips = empty_sum(like.detach())

    def _make_writable(self) -> None:
        """Replace an inference tensor, which ``start_on`` creates in a graph that was compiled in inference mode."""
        if self._sum_of_clips.is_inference():
            with torch.inference_mode(False):
                self._sum_of_clips = self._sum_of_clips.clone()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        before = self._sum_of_clips
        moved = fn(before)  # which may have another dtype
        if has_values(before):
            with torch.inference_mode(False):
                self._sum_of_clips = before.to(moved.device)
        else:
            self.start_on(moved)
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.start_on(torch.empty((), dtype=torch.float32, device="cpu"))


def met_nan(modules: Sequence[NanFlag]) -> list[bool]:
    """Whether each module recorded NaN since its last ``forget``; one read per device."""
    by_device: dict[torch.device, list[int]] = {}
    for index, module in enumerate(modules):
        if has_values(module._sum_of_clips):
            by_device.setdefault(module._sum_of_clips.device, []).append(index)
    found = [False] * len(modules)
    for indices in by_device.values():
        sums = torch.stack([modules[index]._sum_of_clips for index in indices])
        for index, is_nan in zip(indices, sums.isnan().tolist(), strict=True):
            found[index] = is_nan
    return found
