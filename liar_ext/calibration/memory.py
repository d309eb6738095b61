"""How much memory there is for sums, on the CPU: what the machine and its container leave."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from liar_ext.data.batches import FOLDS
from liar_ext.errors import InputError

PROC, CGROUP = Path("/proc"), Path("/sys/fs/cgroup")


def bytes_of_sums(features: int) -> int:
    """Return the bytes of the sums at one site: ``d²`` of float64 for each fold."""
    return FOLDS * 8 * features**2


def check_memory(operation: str, needed: int) -> None:
    """Raise InputError if sums of so many bytes can't be held at once on the CPU."""
    free = available_memory()
    if free is not None and needed > free:
        raise InputError(
            f"{operation}: the sums of all sites take {needed / 2**30:.3g} GiB at once, and "
            f"{free / 2**30:.3g} are free; free some, or let liar prune --memory sum them in groups"
        )


def available_memory(proc: Path = PROC, cgroup: Path = CGROUP) -> int | None:
    """Return the bytes that a process may still take, or None where nothing says so.

    The least of what the kernel calls available and of what the control groups of this process,
    version 2 or 1, have left of their limits; page cache that a group can drop counts as free.
    """
    found = [*_machine(proc / "meminfo"), *_groups(proc / "self" / "cgroup", cgroup)]
    return max(min(found), 0) if found else None


def _machine(meminfo: Path) -> Iterator[int]:
    facts = _table(meminfo)
    if "MemAvailable" in facts:
        yield facts["MemAvailable"] << 10
    elif "MemFree" in facts:  # kernels before 3.14
        yield (facts["MemFree"] + facts.get("Cached", 0)) << 10


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
