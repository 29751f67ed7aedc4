"""Find problems of quantizers in training from the statistics of its steps."""

from collections.abc import Iterator, Mapping, Sequence, Set

from .operand_statistics import OperandStatistics

_MAX_NAMES = 8  # of operands in one warning
_EXPECTED = 10  # expected changed codes of a layer; if they are independent, P(no change) = exp(-10)


class TrainingWarnings:
    """Watches the statistics of a training run; each warning comes once for each operand.

    Args:
        clip_factor, dead_sqnr_db, still_logs: as for ``OctavCallback``.
    """

    def __init__(self, clip_factor: float, dead_sqnr_db: float, still_logs: int):
        self._clip_factor, self._dead_sqnr_db, self._still_logs = clip_factor, dead_sqnr_db, still_logs
        self.first_clips: dict[tuple[str, str], float] = {}
        self._still: dict[str, tuple[int, float]] = {}  # layer -> logs without a changed code, codes expected to change
        self._known: set[tuple[str, str, str]] = set()

    def look(
        self, statistics: Sequence[OperandStatistics], changed_codes: Mapping[str, float], trained: Set[str]
    ) -> Iterator[str]:
        """The warnings from one measurement.

        Args:
            statistics: of all operands.
            changed_codes: layer -> share of its weights whose code changed since the last measurement.
            trained: layers whose weight has a gradient and a learning rate above 0.
        """
        found: dict[str, list[str]] = {}
        for operand in statistics:
            for problem, facts in self._problems(operand):
                self._note(found, problem, operand.module, operand.operand, facts)
        weights = {each.module: each.elements for each in statistics if each.operand == "weight"}
        of_trained = {name: share for name, share in changed_codes.items() if name in trained}
        for module, logs in self._still_layers(of_trained, weights):
            self._note(found, "still", module, "weight", f"{logs} logs")
        for problem, names in found.items():
            more = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
            yield f"{_ADVICE[problem][0]}: {', '.join(names[:_MAX_NAMES])}{more}. {_ADVICE[problem][1]}"

    def _still_layers(
        self, changed_codes: Mapping[str, float], weights: Mapping[str, int]
    ) -> Iterator[tuple[str, int]]:
        """Layers without a changed code that should have had some, and the number of logs for which this was so.

        The share of changed codes of all layers gives the expected number. In a small layer, or between two steps, it
        can be normal that no code changes.
        """
        total = sum(weights[module] for module in changed_codes)
        share_of_all = sum(weights[module] * share for module, share in changed_codes.items()) / max(total, 1)
        before, self._still = self._still, {}
        for module, share in changed_codes.items():
            if not share:
                logs, expected = before.get(module, (0, 0.0))
                self._still[module] = logs, expected = logs + 1, expected + weights[module] * share_of_all
                if logs >= self._still_logs and (expected >= _EXPECTED or not share_of_all):
                    yield module, logs

    def _note(self, found: dict[str, list[str]], problem: str, module: str, operand: str, facts: str) -> None:
        if (problem, module, operand) not in self._known:
            self._known.add((problem, module, operand))
            found.setdefault(problem, []).append(f"{module} {operand} ({facts})")

    def _problems(self, operand: OperandStatistics) -> Iterator[tuple[str, str]]:
        """Kind of problem and the figures that show it."""
        if not operand.elements:
            return
        clip, name = operand.clip or 0.0, (operand.module, operand.operand)
        if clip > 0:  # an adapter's second matrix begins at 0
            self.first_clips.setdefault(name, clip)
        elif operand.operand == "weight" and name not in self.first_clips:
            return
        first = self.first_clips.get(name, clip)
        if operand.lowest == operand.highest:
            yield "constant", f"all {operand.elements:,} values are {operand.lowest:.3g}"
        elif clip * self._clip_factor < first:
            yield "collapsed", f"{first:.3g} → {clip:.3g}"
        elif clip > first * self._clip_factor:
            yield "exploded", f"{first:.3g} → {clip:.3g}"
        elif operand.sqnr_db is not None and operand.sqnr_db < self._dead_sqnr_db:
            yield "lost", f"SQNR {operand.sqnr_db:.1f} dB, {operand.zero_share or 0:.0%} rounded to 0"


_ADVICE = {
    "constant": (
        "Dead operands, whose values are all the same",
        "Their matmuls compute nothing: look for a layer before them that is all zero or masked, and for a learning "
        "rate that is too high.",
    ),
    "collapsed": (
        "Clips that collapsed since the first measurement",
        "What lies beyond them is cut off. If the clips learn, lower the learning rate or leave learned=True out; else "
        "the values themselves shrank: check the layer's weights, weight decay and the loss.",
    ),
    "exploded": (
        "Clips that exploded since the first measurement",
        "Most values then round to 0. Lower the learning rate, add warm-up or clip gradients (max_grad_norm); if a few "
        'outliers make the clip large, choose the clipping rule "octav" or "mse".',
    ),
    "lost": (
        "Operands that quantization loses: the error is about as large as the signal",
        "Give them more bits or finer clips (module_overrides with other weight_bits, activation_bits or "
        "granularities), or leave their modules in float (exclude_modules).",
    ),
    "still": (
        "Layers whose weights no longer change their codes, while they are trained",
        "Their updates are too small to reach the next level of the grid: raise the learning rate, give them more "
        "bits, or check that gradients reach them.",
    ),
}
