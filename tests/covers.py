"""Combinations of options: a cover of them in `make test`, and the others in `make test-all`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from functools import partial
from itertools import combinations, product

import pytest

slow = partial(pytest.param, marks=pytest.mark.exhaustive)


def cover(together: int, **options: Iterable) -> pytest.MarkDecorator:
    """Parametrize by every combination; those outside a cover are exhaustive.

    In the cover any values of ``together`` options occur together: with 2 every pair, with 1 every
    value. Greedy: the next combination has the most of them that are new, and the rarest values.
    """
    values = [list(each) for each in options.values()]
    every = {
        choice: set(combinations(enumerate(choice), together))
        for choice in product(*map(range, map(len, values)))
    }
    left, chosen, used = set().union(*every.values()), set(), Counter()

    def worth(choice: tuple[int, ...]) -> tuple[int, int]:
        return len(every[choice] & left), -sum(used[place] for place in enumerate(choice))

    while left:
        chosen.add(best := max(every, key=worth))
        left -= every[best]
        used.update(enumerate(best))
    cases = [
        pytest.param(
            *(each[i] for each, i in zip(values, choice, strict=True)),
            marks=() if choice in chosen else pytest.mark.exhaustive,
        )
        for choice in every
    ]
    return pytest.mark.parametrize(tuple(options), cases, ids=_name)


def some(name: str, values: Iterable, *quick: object) -> pytest.MarkDecorator:
    """Parametrize by every value; those that aren't ``quick`` are exhaustive."""
    values = list(values)
    assert all(each in values for each in quick), quick
    cases = [each if each in quick else slow(each) for each in values]
    return pytest.mark.parametrize(name, cases, ids=_name)


def _name(value: object) -> str:
    """Return a name that is the same in every process."""
    return getattr(value, "__name__", str(value))
