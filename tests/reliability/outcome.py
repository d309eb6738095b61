"""What came of one attack."""

from __future__ import annotations

import os
import pickle
import resource
import select
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import forked

LIMIT = 60.0  # seconds, for one call
MEMORY = 12 << 30  # bytes of address space for a child; a check of sizes that failed shows here

# What must never come of an attack, and what may.
BAD = ("traceback", "crash", "wrong answer", "hang", "code run", "data lost", "left behind")
GOOD = ("refused", "done", "other outputs")


@dataclass(frozen=True)
class Outcome:
    """One attack: what was called, on what, what came of it, and in which time."""

    check: str
    case: str
    call: str
    verdict: str
    seconds: float
    detail: str = ""

    def __post_init__(self) -> None:
        assert self.verdict in BAD + GOOD, self.verdict

    @property
    def bad(self) -> bool:
        return self.verdict in BAD


def in_child(call: Callable[[], Any], limit: float = LIMIT) -> tuple[str, Any, float]:
    """Run a call in a forked process.

    Returns
    -------
    tuple
        ``("value", result)``, ``("error", text)`` with the traceback, ``("crash", signal)`` or
        ``("hang", None)``; and the seconds it took.
    """
    start = time.monotonic()
    reader, writer = os.pipe()
    child = forked.fork(lambda: _answer(call, reader, writer), Path(os.devnull))
    os.close(writer)
    answer = b""
    while (left := start + limit - time.monotonic()) > 0:
        if select.select([reader], [], [], left)[0]:
            block = os.read(reader, 1 << 16)
            answer += block
            if not block:
                break
    os.close(reader)
    code = forked.end(child, max(start + limit - time.monotonic(), 0.0))
    seconds = time.monotonic() - start
    if code is None:
        return "hang", None, seconds
    if code or not answer:
        return "crash", f"exit code {code}", seconds
    return (*pickle.loads(answer), seconds)


def _answer(call: Callable[[], Any], reader: int, writer: int) -> None:
    """Send what a call returned, or raised, through a pipe."""
    os.close(reader)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    try:
        answer = ("value", call())
    except BaseException:
        answer = ("error", traceback.format_exc())
    with os.fdopen(writer, "wb") as pipe:
        pipe.write(pickle.dumps(answer))
