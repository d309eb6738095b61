"""Operators called at random: each call agrees with the float64 oracle or is refused by name."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path

from reliability.outcome import Outcome

TITLE = "operator calls"
FULL, SHORT = 10_000, 100
VERDICTS = {
    "agreed": "done",
    "refused": "refused",
    "wrong": "wrong answer",
    "tracebacks": "traceback",
    "crashed": "crash",
}


def run(count: int, seed: int, work: Path) -> Iterator[Outcome]:
    """Call the operators ``count`` times, in turn, with shapes, strides, types and values drawn."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "ops"))
    from fuzz import OPERATORS, outcomes

    before = time.monotonic()
    for number, outcome in outcomes(seed, count):
        now = time.monotonic()
        name = OPERATORS[number % len(OPERATORS)]
        yield Outcome(TITLE, f"call {number}", name, VERDICTS[outcome], now - before)
        before = now
