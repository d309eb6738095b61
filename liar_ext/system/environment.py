"""The process: what the ``liar`` command needs before torch is imported, children, and memory.

OpenMP reads its environment when torch loads it. Without the passive wait policy the threads of two
busy processes spin at barriers, and take the cores from those that they wait for.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePath
from types import TracebackType

PROC, CGROUP = Path("/proc"), Path("/sys/fs/cgroup")
TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # variables that it sets
# Isolated until the search path is the parent's: no file of the current folder is imported.
CHILD = """\
import sys, json, runpy
sys.path[:] = json.loads(sys.argv.pop(1))
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def is_command(argv: Sequence[str], original: Sequence[str]) -> bool:
    """Tell whether a process is the ``liar`` command, by ``sys.argv`` and ``sys.orig_argv``."""
    if argv and argv[0] == "-m":  # the package of ``python -m`` is being imported
        at = original.index("-m") + 1 if "-m" in original else len(original)
        return original[at : at + 1] == ["liar_ext"]
    name = PurePath(argv[0]) if argv else PurePath()
    return name.stem == "liar" and name.suffix in ("", ".exe")


def launched() -> bool:
    """Tell whether torchrun started this process."""
    return all(name in os.environ for name in TORCHRUN)


def child(script: str | os.PathLike[str], *arguments: object) -> list[str]:
    """Return the command that runs a script in a process that imports from where this one does."""
    paths = json.dumps([os.path.abspath(path) for path in sys.path])
    return [sys.executable, "-I", "-c", CHILD, paths, os.fspath(script), *map(str, arguments)]


def process_memory(peak: bool = False) -> int:
    """Return the resident memory of this process in bytes, now or at its peak.

    Without ``/proc`` it is the peak. On Linux ``ru_maxrss`` would begin at the parent's.
    """
    found = _table(PROC / "self" / "status").get("VmHWM" if peak else "VmRSS")
    if found is not None:
        return found << 10
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def available_memory(proc: Path = PROC, cgroup: Path = CGROUP) -> int | None:
    """Return the bytes that a process may still take, None if unknown.

    The least of the kernel's available memory and of what its control groups, version 2 or 1, have
    left; page cache that a group can drop counts as free.
    """
    found = list(_groups(proc / "self" / "cgroup", cgroup))
    kernel = _table(proc / "meminfo").get("MemAvailable")
    found += [] if kernel is None else [kernel << 10]
    return max(min(found), 0) if found else None


def _groups(own: Path, cgroup: Path) -> Iterator[int]:
    """Yield what each control group on the way to the root has left."""
    for line in _read(own).splitlines():
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        if not controllers:
            root, most, used = cgroup, "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            root, most, used = cgroup / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        group = root / path.strip("/")
        # In a container the path is often that of the host: then only the root is there.
        for folder in {group, *group.parents, root}:
            limit, taken = _read(folder / most).strip(), _read(folder / used).strip()
            if limit.isdigit() and taken.isdigit():
                stat = _table(folder / "memory.stat")
                cache = stat.get("total_inactive_file", stat.get("inactive_file", 0))
                yield int(limit) - int(taken) + cache


def _table(path: Path) -> dict[str, int]:
    """Return the numbers of a file of lines such as ``MemFree: 12 kB``, by name."""
    rows = (line.replace(":", " ").split() for line in _read(path).splitlines())
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdigit()}


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _quietly_interrupted(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Show no traceback of Ctrl-C, which may come while modules are imported."""
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)


if is_command(sys.argv, sys.orig_argv):
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    sys.excepthook = _quietly_interrupted


@contextmanager
def errors_alone() -> Iterator[None]:
    """Let transformers log errors alone; afterwards its verbosity is as it was."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


@cache
def version_of(package: str) -> str | None:
    """Return the version of a package, which is read from files once; None if not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
