"""Watch or replace what modules compute, for as long as a context is open."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn


class Ended(Exception):
    """Raised by a callback, or a forward put in place, to leave a forward pass early.

    Whoever started the pass catches it; its arguments carry what was on its way.
    """


@contextmanager
def watched(module: nn.Module, callback: Callable[[tuple, object], None]) -> Iterator[None]:
    """Call ``callback`` with the positional arguments and the output of each run of a module."""

    def hook(_: nn.Module, args: tuple, output: object) -> None:
        callback(args, output)

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def replaced(module: nn.Module, forward: Callable) -> Iterator[None]:
    """Let a module compute something else; a forward that others put there is given back."""
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before
