"""A benchmark as it is stored: rates of a pruned model beside those of the dense one."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from liar_ext.errors import InputError
from liar_ext.untrusted import count, listing, mapping, named, number, read_object, record, text

VERSION = 1
MOST_ROWS = 100


@dataclass(frozen=True)
class Quartiles:
    """Median, first and third quartile of what the rounds gave."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Quartiles:
        """Return the quartiles of values, by linear interpolation between neighbours."""
        return cls(*np.quantile(values, (0.5, 0.25, 0.75)).tolist())


@dataclass(frozen=True)
class Rate:
    """One thing that was timed: of both models, and pruned / dense round by round."""

    batch: int
    what: str
    unit: str
    pruned: Quartiles
    dense: Quartiles | None = None
    ratio: Quartiles | None = None


@dataclass(frozen=True)
class ModelFacts:
    """A model of a benchmark: its name, parameters, bytes of weights, and peaks of memory.

    ``peak`` is resident memory in bytes, of a fresh process: after ``load``, and after the inputs
    of each batch size, by that number; on a GPU, the memory of the device under ``device``.
    """

    name: str
    params: int | None = None
    weight_bytes: int | None = None
    peak: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Benchmark:
    """What ``liar bench`` measured.

    Parameters
    ----------
    pruned, dense : ModelFacts
        The two models; ``dense`` is None where one was measured alone.
    report_digest : str
        SHA-256 of the report of the pruned folder, by which it is known again; "" without one.
    settings, machine : dict
        How it was measured, and where.
    rates : list of Rate
        What was timed.
    """

    pruned: ModelFacts
    dense: ModelFacts | None = None
    report_digest: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    machine: dict[str, str] = field(default_factory=dict)
    rates: list[Rate] = field(default_factory=list)

    def to_json(self) -> str:
        """Return it as strict JSON."""
        return json.dumps({"version": VERSION, **asdict(self)}, indent=1, allow_nan=False) + "\n"

    def rate(self, what: str, batch: int | None = None) -> Rate | None:
        """Return the rate of a name, of one batch size or of the smallest that there is."""
        found = [each for each in self.rates if each.what == what and batch in (None, each.batch)]
        return min(found, key=lambda each: each.batch, default=None)


def bench_file(folder: str | os.PathLike[str]) -> Path:
    """Return where the benchmark of a folder is stored: beside it, for the folder is sealed."""
    path = Path(folder).resolve()
    return path.with_name(f"{path.name}.bench.json")


def read_bench(path: Path, operation: str = "report") -> Benchmark:
    """Return a stored benchmark; what is missing, or no number, is left out.

    Raises
    ------
    InputError
        If the file is none.
    """
    fields, _ = read_object(path, operation)
    if fields.get("version") != VERSION or not isinstance(fields.get("rates"), list):
        raise InputError(
            f"{operation}: {path} is no benchmark of version {VERSION}; write it by liar bench"
        )
    rates = [_rate(mapping(row)) for row in listing(fields["rates"])[:MOST_ROWS]]
    return Benchmark(
        pruned=_model(fields.get("pruned")),
        dense=_model(fields["dense"]) if mapping(fields.get("dense")) else None,
        report_digest=text(fields.get("report_digest"), 64),
        settings=named(fields.get("settings")),
        machine=named(fields.get("machine")),
        rates=[rate for rate in rates if rate is not None],
    )


def _rate(row: Any) -> Rate | None:
    batch, pruned = count(row.get("batch")), _quartiles(row.get("pruned"))
    if batch is None or pruned is None:
        return None
    dense, ratio = _quartiles(row.get("dense")), _quartiles(row.get("ratio"))
    return Rate(batch, text(row.get("what"), 40), text(row.get("unit"), 40), pruned, dense, ratio)


def _quartiles(value: Any) -> Quartiles | None:
    found = record(value, **dict.fromkeys(("median", "low", "high"), number))
    return Quartiles(**found) if found and min(found.values()) >= 0 else None


def _model(value: Any) -> ModelFacts:
    facts = mapping(value)
    peak = {key: each for key, each in named(facts.get("peak")).items() if count(each) is not None}
    sizes = (count(facts.get(name)) for name in ("params", "weight_bytes"))
    return ModelFacts(text(facts.get("name"), 200), *sizes, peak)
