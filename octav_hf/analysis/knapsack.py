"""One option for each block, under a limit on the total cost, with the least total error."""

import math
from collections.abc import Sequence

import torch

RESOLUTION = 2**18
"""The most steps that a limit is divided into."""


def cheapest_errors(
    costs: Sequence[Sequence[int]], errors: Sequence[Sequence[float]], limit: int, resolution: int = RESOLUTION
) -> list[int]:
    """The option of each block for which the sum of errors is least and that of costs at most ``limit``.

    The multiple-choice knapsack problem, by dynamic programming: ``best[c]``, the least error of the blocks so far at
    a cost of at most c steps, follows for one block more from ``min over options o of best[c - cost_o] + error_o``. A
    step is the greatest common divisor of what options cost more than the cheapest of their block; the result is then
    exact. Costs of layers whose sizes have little in common would take more than ``resolution`` steps. These are
    rounded up, each by less than ``limit / resolution``, so that the limit still holds.

    Args:
        costs: of the options of each block, integers.
        errors: of the same options.
        limit: of the sum of costs.
        resolution: the most steps; time and memory grow with it.

    Returns:
        The index of an option for each block.

    Raises:
        ValueError: the cheapest options together cost more than ``limit``.
    """
    lowest = [min(block) for block in costs]
    spare = limit - sum(lowest)
    if spare < 0:
        raise ValueError(f"the cheapest options cost {sum(lowest)} together, and the limit is {limit}")
    extra = [[cost - low for cost in block] for block, low in zip(costs, lowest, strict=True)]
    step = max(math.gcd(*(cost for block in extra for cost in block)), -(-spare // resolution), 1)
    room = spare // step
    best = torch.zeros(room + 1, dtype=torch.float64, device="cpu")
    choices = []
    for block, error in zip(extra, errors, strict=True):
        totals = torch.full((len(block), room + 1), math.inf, dtype=torch.float64, device="cpu")
        for option, cost in enumerate(block):
            steps = -(-cost // step)
            totals[option, steps:] = best[: max(room + 1 - steps, 0)] + error[option]
        best, choice = totals.min(dim=0)
        choices.append(choice.to(torch.uint8))  # kept for all blocks
    chosen = []
    for block, choice in zip(reversed(extra), reversed(choices), strict=True):
        option = int(choice[room])
        room -= -(-block[option] // step)
        chosen.append(option)
    return chosen[::-1]
