from __future__ import annotations

import itertools
import random

import pytest

from liar_ext.selection.costs import MAX_GRAINS, choose


def brute_force(costs, losses, limit):
    """The least loss of all combinations that fit."""
    best = float("inf")
    for taken in itertools.product(*(range(len(options)) for options in costs)):
        if sum(options[i] for options, i in zip(costs, taken, strict=True)) <= limit:
            best = min(best, total(losses, taken))
    return best


def total(values, taken):
    return sum(options[i] for options, i in zip(values, taken, strict=True))


def problem(seed, scale=1):
    """Options of any shape: not convex, not even monotone."""
    draw = random.Random(seed)
    lists = draw.randint(1, 4)
    costs, losses = [], []
    for _ in range(lists):
        options = sorted(draw.sample(range(1, 40), draw.randint(1, 6)))
        costs.append([scale * cost for cost in options])
        losses.append([draw.random() for _ in options])
    least = sum(options[0] for options in costs)
    most = sum(options[-1] for options in costs)
    return costs, losses, draw.uniform(least, most)


@pytest.mark.parametrize("seed", range(60))
@pytest.mark.parametrize("scale", [1, 1728])
def test_equals_brute_force(seed, scale):
    costs, losses, limit = problem(seed, scale)
    taken = choose(costs, losses, limit)
    assert total(costs, taken) <= limit
    assert total(losses, taken) == pytest.approx(brute_force(costs, losses, limit), abs=1e-12)


@pytest.mark.parametrize("seed", range(20))
def test_large_costs_are_rounded_to_the_safe_side(seed):
    costs, losses, limit = problem(seed, scale=MAX_GRAINS + 1)
    costs = [[cost + index for index, cost in enumerate(options)] for options in costs]
    limit = max(limit, sum(options[0] for options in costs))
    taken = choose(costs, losses, limit)
    assert total(costs, taken) <= limit
    tighter = limit - len(costs) * limit / MAX_GRAINS
    assert total(losses, taken) <= brute_force(costs, losses, tighter) + 1e-12


def test_the_first_options_fit_a_limit_that_is_theirs():
    assert choose([[3, 5], [4, 9]], [[2.0, 0.0], [2.0, 0.0]], 7) == [0, 0]
    assert choose([[3, 5], [4, 9]], [[2.0, 0.0], [2.0, 0.0]], 14) == [1, 1]
    assert choose([[5]], [[1.0]], 5) == [0]
