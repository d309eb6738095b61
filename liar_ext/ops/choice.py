"""Choose between backends that do the same work on a GPU: checked against float64, timed, and kept.

At the first call of a kind on a device, the backends that exist are checked on a small problem. Of
those that are right, the fastest on a problem of that kind is taken, and noted in a cache file for
the next process. A backend that is wrong or raises is left out, with a warning. A variable of the
environment forces a backend, unchecked. :mod:`liar_ext.ops.backends` says what there is.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from liar_ext.system.environment import version_of
from liar_ext.system.errors import InputError, one_line

RUNS = 3
Backend = Callable[..., object]


@dataclass(frozen=True)
class Kind:
    """What a choice holds for, whose text is the key of a measurement."""

    device: torch.device
    words: tuple[str, ...] = ()
    sizes: tuple[int, ...] = ()  # rounded up, so that one measurement serves many

    def checked(self) -> Kind:
        """Return the kind of all sizes: one check serves them."""
        return Kind(self.device, self.words)

    def __str__(self) -> str:
        return " ".join([str(self.device), *self.words, " × ".join(map(str, self.sizes))]).rstrip()


@dataclass
class Chooser:
    """The choices of a process for an operator that has several backends."""

    name: str
    variable: str  # of the environment, forces a backend
    backends: Callable[[torch.device], Mapping[str, Backend]]  # of equal speed the first is taken
    fault: Callable[[Backend, Kind], str]  # of a backend on a small problem, or nothing
    problem: Callable[[Kind], Callable[[Backend], object]]  # gives a problem of a kind to a backend
    chosen: dict[Kind, str] = field(init=False, default_factory=dict)
    seconds: dict[Kind, dict[str, float]] = field(init=False, default_factory=dict)
    # By kind and backend why it is wrong, or nothing where it is right.
    wrong: dict[tuple[Kind, str], str] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.backends = functools.cache(self.backends)  # are looked for once a device

    def choose(self, kind: Kind) -> str:
        """Return the name of the backend for a kind of call, found once."""
        if kind in self.chosen:
            return self.chosen[kind]
        found, variable = self.backends(kind.device), self.variable
        forced = os.environ.get(variable)
        if forced:
            if forced not in found:
                raise InputError(
                    f"{variable}={forced}: must be one of {', '.join(found)} on {kind.device}; "
                    "unset it to let the fastest be found"
                )
            self.chosen[kind] = forced
            return forced
        if kind.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return next(iter(found))  # no clock runs in a graph
        right = {name: each for name, each in found.items() if self._is_right(kind, name)}
        if not right:
            raise RuntimeError(
                f"{self.name}: no backend is right on {kind.device}; use --device cpu"
            )
        self.chosen[kind] = self._fastest(kind, right)
        return self.chosen[kind]

    def backend(self, kind: Kind) -> Backend:
        """Return the backend for a kind of call."""
        return self.backends(kind.device)[self.choose(kind)]

    def _is_right(self, kind: Kind, name: str) -> bool:
        """Tell whether a backend passes the check, and say so loudly where it does not."""
        key = kind.checked(), name
        if key not in self.wrong:
            try:
                why = self.fault(self.backends(kind.device)[name], kind)
            except Exception as error:  # of a compiler, a driver or a library: it is out
                why = f"it raises {type(error).__name__}: {one_line(error)}"
            self.wrong[key] = why
            if why:
                warnings.warn(
                    f"liar_ext: the {name} backend of {self.name} is left out on "
                    f"{kind.checked()}: {why}. The others do the work. Please report "
                    "this with the output of `liar doctor --json`, see CONTRIBUTING.md",
                    RuntimeWarning,
                    stacklevel=2,
                )
        return not self.wrong[key]

    def _fastest(self, kind: Kind, right: Mapping[str, Backend]) -> str:
        """Return the fastest backend, from the cache file or by the clock."""
        if len(right) == 1:
            return next(iter(right))
        key = f"{self.name} on {machine(kind.device)}: {kind}"
        kept = _read().get(key)
        if not isinstance(kept, dict) or set(kept) != set(right):
            try:
                run = self.problem(kind)
                kept = {name: seconds(lambda each=each: run(each)) for name, each in right.items()}
            except torch.OutOfMemoryError:
                return next(iter(right))
            _write(key, kept)
        self.seconds[kind] = kept
        return min(right, key=lambda name: kept[name])

    def lines(self) -> list[str]:
        """Return each choice, with milliseconds, and what was left out."""
        said = []
        for kind, name in self.chosen.items():
            times = self.seconds.get(kind, {})
            beside = ", ".join(f"{each} {1e3 * value:.3g} ms" for each, value in times.items())
            said.append(f"{kind}: {name}" + (f" ({beside})" if beside else ""))
        return said + [
            f"{kind}: not {name}: {why}" for (kind, name), why in self.wrong.items() if why
        ]


def power_of_two(size: int, most: int) -> int:
    """Return a size rounded up to a power of two, from 32 on and up to a limit."""
    return min(most, 1 << max(5, (size - 1).bit_length()))


def seconds(run: Callable[[], object]) -> float:
    """Return the least time of a call on a GPU, after one that may compile."""
    least = float("inf")
    for attempt in range(RUNS + 1):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        with torch.no_grad():
            run()
        end.record()
        end.synchronize()
        if attempt > 0:
            least = min(least, begin.elapsed_time(end) / 1e3)
    return least


def machine(device: torch.device) -> str:
    """Return what a measurement holds for: the card, and the libraries that were measured."""
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    triton = importlib.util.find_spec("triton") and version_of("triton")
    return f"{card}, torch {torch.__version__}, triton {triton}, liar_ext {version_of('liar_ext')}"


def cache_file() -> Path:
    """Return the file that keeps measurements from one process to the next."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home, "liar_ext", "backends.json")


def _read() -> dict:
    """Return what was measured; nothing of a file that is not as it was written."""
    try:
        found = json.loads(cache_file().read_text("utf-8"))
    except (OSError, ValueError, RuntimeError):
        return {}
    return {
        key: times
        for key, times in (found.items() if isinstance(found, dict) else ())
        if isinstance(times, dict) and all(isinstance(t, float) and t > 0 for t in times.values())
    }


def _write(key: str, times: Mapping[str, float]) -> None:
    """Note a measurement; where that can't be done the next process measures again."""
    with contextlib.suppress(OSError, RuntimeError, ImportError):
        from liar_ext.system.atomic_write import atomic_write  # Windows lacks what that needs

        path = cache_file()
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({**_read(), key: times}, indent=1)
        with atomic_write(path) as file:
            file.write(text.encode())
