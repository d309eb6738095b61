"""What sites and models take in seconds, as it was measured: a table that is kept as JSON."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from liar_ext.checkpoint.folder import REPORT_JSON
from liar_ext.models.plan import Budget
from liar_ext.models.sites import Site
from liar_ext.system.errors import InputError, refusing
from liar_ext.system.files import mapping, named, read_json, text

VERSION = 1


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
        counts, seconds = list(self.counts), list(self.seconds)
        ascending = counts == sorted({*counts, self.units}) and counts[0] >= 0
        known = all(0.0 <= each < math.inf for each in (*seconds, *self.spread))
        fits = len(counts) == len(seconds) == len(self.spread) and seconds == sorted(seconds)
        if not ascending or not known or not fits:
            raise InputError(
                "latency: a row must have ascending counts up to all units, and seconds that never "
                "fall and a spread for each of them"
            )

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
        found = {name: getattr(self, name) for name in ("phase", "batch", "prompt", "new_tokens")}
        asked = {name: getattr(budget, f"latency_{name}") for name in found}
        if asked != found:
            told = ", ".join(f"{name} {value}" for name, value in found.items())
            raise InputError(
                f"latency: the table was measured with {told}, the budget asks for "
                f"{', '.join(map(str, asked.values()))}; ask for what it has, or measure again"
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
        what, hint = "latency: this is no table", "measure_latency writes one"
        with refusing(what, hint, ArithmeticError, LookupError, TypeError, ValueError, named=True):
            if facts["version"] != VERSION:
                raise ValueError(f"its version is not {VERSION}")
            found = cls(
                phase=text(facts["phase"]),
                **{name: int(facts[name]) for name in ("batch", "prompt", "new_tokens")},
                **{name: float(facts[name]) for name in ("fixed", "spread", "scale")},
                rows=tuple(map(_row, facts["rows"])),
                where=named(facts.get("where")),
            )
            if not all(0.0 <= each < math.inf for each in (found.fixed, found.spread, found.scale)):
                raise ValueError("fixed, spread and scale must be finite and at least 0")
            return found

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> LatencyTable:
        """Read a table that :meth:`save` wrote, or that of a report: a folder or its JSON.

        InputError is raised if the file can't be read, or holds no table.
        """
        path = Path(path)
        facts = read_json(path / REPORT_JSON if path.is_dir() else path, "latency")
        return cls.from_dict(mapping(facts.get("latency")).get("table") or facts)


def _row(facts: Mapping[str, Any]) -> SizeRow:
    several = {n: tuple(map(float, facts[n])) for n in ("seconds", "spread")}
    numbers = {n: int(facts[n]) for n in ("units", "width", "groups", "d_out", "sites")}
    kind, unit = (text(facts[name], 40) for name in ("kind", "unit"))
    return SizeRow(kind, unit, **numbers, counts=tuple(map(int, facts["counts"])), **several)
