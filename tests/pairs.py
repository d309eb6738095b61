"""Combinations of options: every pair of values in `make test`, all of them in `make test-all`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, product

import pytest


def pairwise(**options: Sequence) -> pytest.MarkDecorator:
    """Parametrize by every combination; those without which every pair still occurs are exhaustive.

    Greedy: the next one in the cover is the combination with the most pairs that it lacks.
    """
    every = {
        choice: set(combinations(enumerate(choice), 2))
        for choice in product(*map(range, map(len, options.values())))
    }
    left, cover = set().union(*every.values()), set()
    while left:
        cover.add(best := max(every, key=lambda choice: len(every[choice] & left)))
        left -= every[best]
    cases = [
        pytest.param(
            *(values[i] for values, i in zip(options.values(), choice, strict=True)),
            marks=() if choice in cover else pytest.mark.exhaustive,
        )
        for choice in every
    ]
    return pytest.mark.parametrize(tuple(options), cases, ids=str)
