"""The quantizer of an activation with clips of the global batch."""

from typing import Any

import torch
from torch import Tensor

from ..functional import CLIP_RULES
from ..functional.all_ranks import AllRanks, several_ranks
from .fake_quantize import FakeQuantize
from .function_modes import outside_function_modes


class SynchronizedFakeQuantize(FakeQuantize):
    """``FakeQuantize`` with clip and sign of the tensors of all ranks of the default process group together.

    Each call with dynamic clips is a collective; a rank's tensor may be empty. NaN or Inf on one rank is an error on
    all. Without a process group of several ranks, and with frozen clips, it is ``FakeQuantize``. The clipping rule must
    take ``ranks``.

    With ``dim``, which must not include the batch dimension, each clip is of a part on one rank, such as a token. Then
    the only collectives are for a sign that depends on the data and for the sum of clips in calibration, and without
    them NaN or Inf is an error on its own rank only.
    """

    @property
    def cache_key(self) -> tuple[Any, ...]:
        return (*super().cache_key, "all ranks")

    @torch.compiler.disable
    @torch.no_grad()
    @outside_function_modes
    def is_signed(self, x: Tensor) -> bool:
        if self.signed is not None or not several_ranks():
            return super().is_signed(x)
        return self._is_signed(self._all_ranks(x))

    @torch.compiler.disable
    @torch.no_grad()
    @outside_function_modes
    def compute_clip(self, x: Tensor, signed: bool | None = None) -> Tensor:
        if not several_ranks() or self.active_dim is not None:
            return super().compute_clip(x, signed)
        ranks = self._all_ranks(x)
        return self._clip(x, self._is_signed(ranks) if signed is None else signed, ranks)

    @torch.compiler.disable
    @torch.no_grad()
    @outside_function_modes
    def sign_and_clip(self, x: Tensor) -> tuple[bool, Tensor]:
        """As in ``FakeQuantize``, with a single collective for the range of the values."""
        if not several_ranks() or self.active_dim is not None:
            return super().sign_and_clip(x)
        ranks = self._all_ranks(x)
        signed = self._is_signed(ranks)
        return signed, self._clip(x, signed, ranks)

    @torch.compiler.disable
    @torch.no_grad()
    def dynamic_offset(self, x: Tensor, clip: Tensor) -> Tensor | None:
        if not several_ranks():
            return super().dynamic_offset(x, clip)
        ranks = self._all_ranks(x)
        total, count = ranks.sum(torch.stack([clip.sum(), clip.new_tensor(clip.numel())])).tolist()
        return clip.new_tensor(ranks.low) if -ranks.low * count <= total else None

    def _is_signed(self, ranks: AllRanks) -> bool:
        return ranks.low < 0 if self.signed is None else self.signed

    def _all_ranks(self, x: Tensor) -> AllRanks:
        try:
            return AllRanks(x, f"{self.clip}_clip")
        except ValueError as error:
            raise ValueError(f"{self.name or type(self).__name__}: {error}") from error

    def _clip(self, x: Tensor, signed: bool, ranks: AllRanks) -> Tensor:
        return CLIP_RULES[self.clip](x, self.num_bits, signed=signed, ranks=ranks, **self.clip_options)

    def _has_values(self, x: Tensor) -> bool:
        return self._all_ranks(x).numel > 0 if several_ranks() else super()._has_values(x)

    def _sum_over_batch(self, x: Tensor, clip: Tensor) -> tuple[Tensor, int]:
        total, count = super()._sum_over_batch(x, clip)
        if not several_ranks():
            return total, count
        numbers = self._all_ranks(x).sum(torch.cat([total.flatten(), total.new_tensor([count])]))
        return numbers[:-1].view_as(total), int(numbers[-1])

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, synchronized"
