"""Base class of the observers, which find the clips to freeze during calibration."""

from typing import Any

from torch import Tensor

from .frozen_clips import FrozenClips


class ClipObserver:
    """Observes every call of one ``FakeQuantize`` and computes the clips to freeze. It may read values on the host.

    While a quantizer has an observer, its clips are dynamic.
    """

    def __init__(self, quantizer: Any):
        self.quantizer = quantizer
        self._call_counts: set[int] = set()
        self._calls_so_far = 0

    def observe(self, x: Tensor, call_index: int, grid: Any) -> None:
        """Observe one call.

        Args:
            x: the operand; may be empty.
            call_index: index of this call among those for the operand in one forward pass of its module; 0 starts the
                next forward pass.
            grid: the ``Grid`` of this call.

        Raises:
            ValueError: the clips of ``x`` have another shape than those of earlier calls.
        """
        raise NotImplementedError

    def needs_another_pass(self) -> bool:
        """Whether all calls have to be observed a second time."""
        return False

    def frozen(self) -> FrozenClips | None:
        """The clips to freeze, with dtype and device of dynamic clips; ``None`` if a call index had only empty tensors.

        Raises:
            ValueError: the calls in one forward pass have clips of different shapes.
        """
        raise NotImplementedError

    @property
    def may_need_another_pass(self) -> bool:
        """Whether ``needs_another_pass`` may turn out true; known before the first call."""
        return False

    def check_shape(self, now: tuple[int, ...], before: tuple[int, ...]) -> None:
        """Raise ``ValueError`` if clips have another shape than in an earlier call."""
        if now != before:
            raise ValueError(
                f"{self.quantizer.name or 'FakeQuantize'}: clips of shape {now} after clips of shape {before}; they "
                "cannot be frozen together. Calibrate with batches in which the operand always has the same number of "
                'heads and channels, or set its activation_granularity to "tensor"'
            )

    def count_call(self, call_index: int) -> None:
        """Count a call."""
        if call_index == 0 and self._calls_so_far:
            self._call_counts.add(self._calls_so_far)
        self._calls_so_far = call_index + 1

    @property
    def call_counts(self) -> set[int]:
        """Number of calls per forward pass; one number unless forward passes differ."""
        return self._call_counts | ({self._calls_so_far} if self._calls_so_far else set())
