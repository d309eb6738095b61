"""Stop a job at some call of a method, as an interrupt does."""

from __future__ import annotations


def stop_at(monkeypatch, kind: type, name: str, call: int) -> list:
    """Interrupt a method's n-th call, none if it is -1; return a list that grows by each call."""
    original, calls = getattr(kind, name), []

    def stopping(*arguments, **named):
        calls.append(None)
        if len(calls) == call:
            raise KeyboardInterrupt
        return original(*arguments, **named)

    monkeypatch.setattr(kind, name, stopping)
    return calls
