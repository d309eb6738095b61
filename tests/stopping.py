"""Stop a job at some call of a method, as an interrupt or a kill does."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable


def interrupt() -> None:
    raise KeyboardInterrupt


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stop_at(monkeypatch, kind: type, name: str, call: int = -1, stop: Callable = interrupt) -> list:
    """Stop a method's n-th call, none if it is -1; return a list that grows by each call."""
    original, calls = getattr(kind, name), []

    def stopping(*arguments, **named):
        calls.append(None)
        if len(calls) == call:
            stop()
        return original(*arguments, **named)

    monkeypatch.setattr(kind, name, stopping)
    return calls
