"""Seconds of a job on one H100 and on eight, by arithmetic: nothing here runs on a GPU.

Operations and bytes are counted by formula (`bench/scaling/counts.py`, each formula beside the
function that it counts; `tests/quality/test_scaling.py` holds them to real jobs). Seconds are
operations by the GPU's published peak times the share of its own peak that this machine's core
reaches in the same kind of operation. `--measure` measures these shares anew, `--write FILE` puts
the tables into a page.

    python -m bench.scaling
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from bench.common import parser_of, placed, table
from bench.scaling.counts import ALONE, Work, phases
from bench.scaling.rates import (
    DEVICE,
    MEMORY,
    NVLINK,
    PCIE,
    PEAKS,
    SHARES,
    WHAT,
    measure,
    rate,
)
from bench.scaling.shapes import SHAPES, Settings, Shape, bytes_at_once
from liar_ext.calibration.saved_sums import MEMORY as MOST_ROOM

BEGIN, END = "<!-- tables: make scaling -->", "<!-- end of tables -->"
DISK = 3e9  # bytes a second that files are read and written at: assumed, for a local NVMe drive
DEVICES = (1, 8)
JOBS = {
    "the default job": Settings(),
    "`--preset fast`": Settings(layerwise=False, curve=False),
}


def main() -> None:
    """Print the tables, or write them."""
    parser = parser_of(__doc__)
    parser.add_argument("--measure", action="store_true", help="measure this machine's shares")
    parser.add_argument("--write", type=Path, metavar="FILE", help="put the tables into a page")
    options = parser.parse_args()
    shares = measure() if options.measure else SHARES
    text = "\n".join(lines(shares))
    print(text)
    if options.write:
        page = options.write.read_text(encoding="utf-8")
        options.write.write_text(placed(page, text, BEGIN, END))


def lines(shares: dict[str, float]) -> Iterator[str]:
    """Yield the tables."""
    rates = [
        (what, f"{shares[kind]:.0%}", tera(PEAKS[kind]), tera(rate(kind, shares)))
        for kind, what in WHAT.items()
    ]
    yield table(
        ("kind of operation", "share of the core's peak, measured", "H100: peak", "taken"), rates
    )
    yield ""
    jobs = [(shape, *job) for shape in SHAPES for job in JOBS.items()]
    yield table(("job", "how", "1 GPU", "8 GPUs"), [total(*job, shares) for job in jobs])
    for job in jobs:
        yield ""
        yield from by_phase(*job, shares)


def tera(rate: float) -> str:
    """Return operations a second for a cell."""
    return f"{rate / 1e12:,.0f} TFLOP/s"


def total(shape: Shape, name: str, settings: Settings, shares: dict[str, float]) -> list[str]:
    """Return the row of a job: how, and its seconds on one device and on several."""
    jobs = {count: fitted(shape, settings, count) for count in DEVICES}
    times = [sum(time_of(w, n, shares) for w in phases(shape, job)) for n, job in jobs.items()]
    how = "`--max-memory`, block by block" if jobs[1].by_blocks else "the whole model on a GPU"
    return [f"{shape.name}, {name}", how, *(f"{t:,.0f} s" for t in times)]


def by_phase(
    shape: Shape, name: str, settings: Settings, shares: dict[str, float]
) -> Iterator[str]:
    """Yield the folded table of one job, with a line on its memory."""
    jobs = {count: fitted(shape, settings, count) for count in DEVICES}
    works = {count: phases(shape, job) for count, job in jobs.items()}
    held = bytes_at_once(shape, jobs[1])
    parts = " + ".join(f"{size / 1e9:,.1f} {part}" for part, size in held.items())
    yield '<details markdown="1">'
    yield f"<summary>{shape.name}, {name.replace('`', '')}, by phase</summary>"
    yield ""
    yield f"One GPU holds, in GB: {parts}."
    yield ""
    rows = []
    for alone, several in zip(*works.values(), strict=True):
        times = [time_of(alone, 1, shares), time_of(several, DEVICES[-1], shares)]
        rows.append(row(alone, several, times))
    yield table(("phase", "10¹² operations", "GB", "s, 1 GPU", "s, 8 GPUs"), rows)
    yield ""
    yield "</details>"


def fitted(shape: Shape, settings: Settings, devices: int) -> Settings:
    """Return the settings with sums in groups, or block by block where a device is too small.

    Room for sums is as in :func:`liar_ext.calibration.saved_sums.room_for_sums`, on each device.
    """
    free = DEVICE - bytes_at_once(shape, replace(settings, room=0))["weights"]
    room = int(min(MOST_ROOM, max(free, 0) / 2))
    if sum(bytes_at_once(shape, replace(settings, room=room)).values()) <= DEVICE:
        return replace(settings, room=devices * room)
    return replace(settings, by_blocks=True)


def row(work: Work, several: Work, times: Sequence[float]) -> list[str]:
    """Return the row of a phase: what one device does, and what is handed over by several."""
    kinds = (("forward",), ("gram", "gram32"), ("product", "cholesky"))
    counts = [sum(work.operations[kind] for kind in some) / 1e12 for some in kinds]
    sent = several.sent * (DEVICES[-1] - 1) / DEVICES[-1]
    sizes = [size / 1e9 for size in (work.memory, work.link, work.disk, sent)]
    cells = [
        ", ".join(f"{shown(value)} {what}" for what, value in named.items() if value)
        for named in (
            dict(zip(("model", "sums", "float64"), counts, strict=True)),
            dict(zip(("memory", "PCIe", "files", "ranks"), sizes, strict=True)),
        )
    ]
    return [work.name, *cells, *map(shown, times)]


def shown(value: float) -> str:
    """Return a number for a cell, to two digits at least; nothing for nothing."""
    if not value:
        return ""
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def time_of(work: Work, devices: int, shares: dict[str, float]) -> float:
    """Return seconds as if nothing overlapped but a device's memory with its arithmetic."""
    several = 1 if work.shared == ALONE else devices
    busy = sum(count / rate(kind, shares) for kind, count in work.operations.items())
    found = max(busy, work.memory / MEMORY) / several + work.link / PCIE / several
    found += work.disk / DISK
    return found + work.sent * (devices - 1) / devices / NVLINK


if __name__ == "__main__":
    main()
