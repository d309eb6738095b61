"""What sites and models take in seconds, as it was measured: a table that is kept as JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from liar_ext.models.plan import PHASES, Budget
from liar_ext.models.sites import Site
from liar_ext.system.errors import InputError
from liar_ext.system.untrusted import listing, mapping, named, read_object, text

VERSION = 1
MOST_ROWS, MOST_COUNTS = 4096, 256


@dataclass(frozen=True)
class SizeRow:
    """Sites of one shape, and the seconds that each of them takes by the units that it keeps."""

    kind: str
    unit: str
    units: int
    width: int
    groups: int
    d_out: int
    sites: int  # how many there are of this shape
    counts: tuple[int, ...]  # units kept, ascending; the last is all of them
    seconds: tuple[float, ...]  # medians, never falling
    spread: tuple[float, ...]  # half of the distance between the quartiles of single runs

    def __post_init__(self) -> None:
        ascending = all(a < b for a, b in zip(self.counts, self.counts[1:], strict=False))
        if not self.counts or not ascending or self.counts[0] < 0 or self.counts[-1] != self.units:
            raise InputError("latency: counts must be ascending, up to all units")
        if len(self.seconds) != len(self.counts) or len(self.spread) != len(self.counts):
            raise InputError("latency: a row must have seconds and a spread for every count")
        never_falls = all(a <= b for a, b in zip(self.seconds, self.seconds[1:], strict=False))
        if not never_falls or not all(0.0 <= each < float("inf") for each in self.seconds):
            raise InputError("latency: seconds must be finite, at least 0, and never fall")

    @property
    def shape(self) -> tuple[str, str, int, int, int, int]:
        """What tells sites of one row from those of another."""
        return self.kind, self.unit, self.units, self.width, self.groups, self.d_out

    def by_count(self) -> list[float]:
        """Return seconds for every number of units, ``(units + 1,)``, by linear interpolation.

        Less than the smallest size that was measured costs as much as that; nothing costs nothing.
        """
        found = np.interp(range(self.units + 1), self.counts, self.seconds).tolist()
        return [0.0, *found[1:]]


@dataclass(frozen=True)
class LatencyTable:
    """What :func:`liar_ext.measure_latency` measured, to be kept and used again.

    The model is taken to need ``fixed + Σ_s seconds_s(units kept)``.

    Parameters
    ----------
    phase, batch, prompt, new_tokens
        What was timed, as ``latency_phase`` and so on of :class:`liar_ext.Budget`.
    fixed : float
        Seconds of all but the sites: embeddings, norms, output head, and what lies between.
    spread : float
        Half of the distance between the quartiles of the dense model's seconds.
    rows : tuple of SizeRow
        One per shape.
    scale : float
        What sites save, measured on a whole plan, by what the rows say; 1 where none was measured.
    where : dict
        Device, dtype, threads, versions.
    """

    phase: str
    batch: int
    prompt: int
    new_tokens: int
    fixed: float
    spread: float
    rows: tuple[SizeRow, ...]
    scale: float = 1.0
    where: dict[str, Any] = field(default_factory=dict)

    @property
    def total(self) -> float:
        """Seconds of the dense model."""
        return self.fixed + sum(row.sites * row.seconds[-1] for row in self.rows)

    def check(self, budget: Budget) -> None:
        """Raise InputError unless this is what the budget counts."""
        names = ("phase", "batch", "prompt", "new_tokens")
        asked = [getattr(budget, f"latency_{name}") for name in names]
        found = [getattr(self, name) for name in names]
        if asked != found:
            told = ", ".join(f"{n} {a}" for n, a in zip(names, found, strict=True))
            raise InputError(
                f"latency: the table was measured with {told}, the budget asks for "
                f"{', '.join(map(str, asked))}; ask for what it has, or measure again"
            )

    def check_sites(self, *several: Sequence[Site]) -> None:
        """Raise InputError unless the table counts sites as one of several sets has them."""
        for row in self.rows:
            counts = [sum(site.shape == row.shape for site in some) for some in several]
            if any(counts) and row.sites not in counts:
                raise InputError(
                    f"latency: the table is of {row.sites} layers with {row.units} "
                    f"{row.unit}s, and the model has {max(counts)}; measure this model"
                )

    def to_dict(self) -> dict[str, Any]:
        """Return the table as JSON has it."""
        return json.loads(json.dumps({"version": VERSION, **asdict(self)}, allow_nan=False))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the table as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def from_dict(cls, facts: Mapping[str, Any]) -> LatencyTable:
        """Read what :meth:`to_dict` gave; raise InputError if it is no table."""
        if facts.get("version") != VERSION:
            raise InputError(f"latency: a table must be of version {VERSION}")
        rows = [mapping(row) for row in listing(facts.get("rows"))]
        if not rows or len(rows) > MOST_ROWS:
            raise InputError("latency: a table must have rows")
        try:
            made = cls(
                phase=text(facts["phase"]),
                **{name: int(facts[name]) for name in ("batch", "prompt", "new_tokens")},
                **{name: float(facts[name]) for name in ("fixed", "spread", "scale")},
                rows=tuple(_row(row) for row in rows),
                where=named(facts.get("where")),
            )
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"latency: not a table: {error!r}") from error
        numbers = (made.fixed, made.spread, made.scale)
        if made.phase not in PHASES or not all(0.0 <= each < float("inf") for each in numbers):
            raise InputError("latency: a table must have a phase, and numbers of at least 0")
        return made

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> LatencyTable:
        """Read a table that :meth:`save` wrote, or that of a report: a folder or its JSON.

        InputError is raised if the file can't be read, or holds no table.
        """
        path = Path(path)
        if path.is_dir():
            path = path / "liar" / "report.json"
        facts, _ = read_object(path, "latency")
        inside = mapping(mapping(facts.get("latency")).get("table"))
        try:
            return cls.from_dict(inside or facts)
        except InputError as error:
            raise InputError(f"{error} (in {path}); measure_latency writes one") from None


def _row(facts: Mapping[str, Any]) -> SizeRow:
    found: dict[str, Any] = {name: text(facts[name], 40) for name in ("kind", "unit")}
    found |= {name: int(facts[name]) for name in ("units", "width", "groups", "d_out", "sites")}
    for name, read in (("counts", int), ("seconds", float), ("spread", float)):
        found[name] = tuple(map(read, listing(facts.get(name))[:MOST_COUNTS]))
    return SizeRow(**found)
