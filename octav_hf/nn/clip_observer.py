"""What observes a quantizer in calibration, to find the clips to freeze."""

from typing import Any

from torch import Tensor

from .frozen_clips import FrozenClips


class ClipObserver:
    """Is told every call of one quantizer, a ``FakeQuantize``, and finds the clips to freeze. It may read values.

    While a quantizer has an observer, its clips are dynamic.
    """

    def __init__(self, quantizer: Any):
        self.quantizer = quantizer
        self._call_counts: set[int] = set()
        self._calls_so_far = 0

    def observe(self, x: Tensor, call_index: int, grid: Any) -> None:
        """Take in one call.

        Args:
            x: what the quantizer was called on; may be empty.
            call_index: which multiplication of the operand in one forward pass of its module, from 0; a 0 begins the
                next forward pass.
            grid: the ``Grid`` of this call.

        Raises:
            ValueError: ``x`` has clips for other parts than tensors before.
        """
        raise NotImplementedError

    def needs_another_pass(self) -> bool:
        """Whether the same calls have to be observed once more, all of them."""
        return False

    def frozen(self) -> FrozenClips | None:
        """The clips found, of the dtype and on the device of dynamic ones; ``None`` if a multiplication had no values.

        Raises:
            ValueError: the multiplications in one forward pass have clips of different shapes.
        """
        raise NotImplementedError

    @property
    def may_need_another_pass(self) -> bool:
        """Whether ``needs_another_pass`` can be true, known beforehand."""
        return False

    def check_shape(self, now: tuple[int, ...], before: tuple[int, ...]) -> None:
        """Raise ``ValueError`` if clips have another shape than in an earlier call."""
        if now != before:
            raise ValueError(
                f"{self.quantizer.name or 'FakeQuantize'}: clips of shape {now}, after those of shape {before}, which "
                "cannot be frozen together; calibrate with batches in which the operand has one number of heads and "
                'channels, or give it activation_granularity "tensor"'
            )

    def count_call(self, call_index: int) -> None:
        """Note that a call took place."""
        if call_index == 0 and self._calls_so_far:
            self._call_counts.add(self._calls_so_far)
        self._calls_so_far = call_index + 1

    @property
    def call_counts(self) -> set[int]:
        """How often a forward pass multiplied the operand; one number unless forward passes differ."""
        return self._call_counts | ({self._calls_so_far} if self._calls_so_far else set())
