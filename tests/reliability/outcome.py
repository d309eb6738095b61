"""What came of one attack."""

from __future__ import annotations

import os
import pickle
import resource
import select
import signal
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import forked  # noqa: F401  (says what a fork begins with)

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
    child = os.fork()
    if child == 0:
        os.close(reader)
        os._exit(_answer(call, writer))
    os.close(writer)
    answer = b""
    while (left := start + limit - time.monotonic()) > 0:
        if select.select([reader], [], [], left)[0]:
            block = os.read(reader, 1 << 16)
            answer += block
            if not block:
                break
    else:
        os.kill(child, signal.SIGKILL)
    os.close(reader)
    status = os.waitpid(child, 0)[1]
    seconds = time.monotonic() - start
    if seconds >= limit:
        return "hang", None, seconds
    if not answer:
        return "crash", f"status {status}", seconds
    return (*pickle.loads(answer), seconds)


def _answer(call: Callable[[], Any], writer: int) -> int:
    """Send what a call returned, or raised, through a pipe."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    try:
        answer = ("value", call())
    except BaseException:
        answer = ("error", traceback.format_exc())
    with os.fdopen(writer, "wb") as pipe:
        pipe.write(pickle.dumps(answer))
    return 0
