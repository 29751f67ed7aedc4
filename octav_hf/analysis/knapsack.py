"""Choose one option for each block: the least total error under a limit of the total cost."""

import math
from collections.abc import Sequence

import torch

RESOLUTION = 2**18
"""Maximum number of steps that a limit is divided into."""


def cheapest_errors(
    costs: Sequence[Sequence[int]], errors: Sequence[Sequence[float]], limit: int, resolution: int = RESOLUTION
) -> list[int]:
    """The option of each block for which the sum of errors is least and that of costs at most ``limit``.

    This is the multiple-choice knapsack problem, solved by dynamic programming. Let ``best[c]`` be the least error of
    the blocks so far at a cost of at most c steps. With one more block it becomes the minimum over the block's options
    o of ``best[c - cost_o] + error_o``. A step is the greatest common divisor of the cost differences to the cheapest
    option of each block, which makes the result exact. If this would take more than ``resolution`` steps, costs are
    rounded up, each by less than ``limit / resolution``, so that the limit still holds.

    Args:
        costs: of the options of each block, integers.
        errors: of the same options.
        limit: of the sum of costs.
        resolution: maximum number of steps; time and memory grow with it.

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
        choices.append(choice.to(torch.int16))  # kept for all blocks
    chosen = []
    for block, choice in zip(reversed(extra), reversed(choices), strict=True):
        option = int(choice[room])
        room -= -(-block[option] // step)
        chosen.append(option)
    return chosen[::-1]
