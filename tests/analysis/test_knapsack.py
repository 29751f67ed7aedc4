"""The allocation against all combinations."""

import itertools
import random

import pytest

from octav_hf.analysis.knapsack import cheapest_errors

Problem = tuple[list[list[int]], list[list[float]], int]


def problem(seed: int, step: int = 1) -> Problem:
    """Up to 6 blocks of up to 4 options, with costs that are multiples of ``step``, and a limit that can be kept."""
    generator = random.Random(seed)
    sizes = [generator.randint(1, 4) for _ in range(generator.randint(1, 6))]
    costs = [[step * generator.randint(0, 40) for _ in range(size)] for size in sizes]
    errors = [[generator.random() ** 4 for _ in range(size)] for size in sizes]
    return costs, errors, generator.randint(sum(map(min, costs)), sum(map(max, costs)))


def least_error(costs: list[list[int]], errors: list[list[float]], limit: int) -> float:
    """By trying all combinations."""
    options = itertools.product(*(range(len(block)) for block in costs))
    allowed = (o for o in options if sum(c[i] for c, i in zip(costs, o, strict=True)) <= limit)
    return min(sum(e[i] for e, i in zip(errors, o, strict=True)) for o in allowed)


def totals(costs: list[list[int]], errors: list[list[float]], chosen: list[int]) -> tuple[int, float]:
    return (
        sum(c[i] for c, i in zip(costs, chosen, strict=True)),
        sum(e[i] for e, i in zip(errors, chosen, strict=True)),
    )


@pytest.mark.parametrize("step", [1, 147456])
@pytest.mark.parametrize("seed", range(40))
def test_it_is_the_best_of_all_combinations(seed: int, step: int) -> None:
    costs, errors, limit = problem(seed, step)
    cost, error = totals(costs, errors, cheapest_errors(costs, errors, limit))
    assert cost <= limit
    assert error == pytest.approx(least_error(costs, errors, limit), rel=1e-12)


@pytest.mark.parametrize("seed", range(20))
def test_rounded_costs_keep_the_limit_and_lose_little(seed: int) -> None:
    costs, errors, limit = problem(seed, 10007)
    generator = random.Random(seed)
    costs = [[cost + generator.randint(0, 999) for cost in block] for block in costs]
    limit = max(limit, sum(map(min, costs)))
    cost, error = totals(costs, errors, cheapest_errors(costs, errors, limit, resolution=20))
    assert cost <= limit
    spare = limit - sum(map(min, costs))
    less = limit - len(costs) * (spare // 20 + 1)  # each cost is rounded up by less than a step
    if less >= sum(map(min, costs)):
        assert error <= least_error(costs, errors, less) + 1e-12


def test_without_room_the_cheapest_are_chosen() -> None:
    assert cheapest_errors([[5, 3], [2, 7]], [[0.0, 9.0], [9.0, 0.0]], 5) == [1, 0]


def test_a_limit_that_cannot_be_kept_is_refused() -> None:
    with pytest.raises(ValueError, match="cost 5 together, and the limit is 4"):
        cheapest_errors([[5, 3], [2, 7]], [[0.0, 9.0], [9.0, 0.0]], 4)


def test_many_rounded_costs_keep_the_limit() -> None:
    costs, errors = [[0, 18], [0, 19]] * 15, [[1.0, 0.0]] * 30
    cost, error = totals(costs, errors, cheapest_errors(costs, errors, 100, resolution=10))  # a step is 10
    assert cost <= 100
    assert error == 25  # two steps each
