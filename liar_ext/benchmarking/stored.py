"""A benchmark as it is stored: rates of a pruned model beside those of the dense one."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from liar_ext.errors import InputError
from liar_ext.untrusted import count, listing, mapping, number, read_object, text

VERSION = 1
MOST_ROWS = 100
MIB = 2**20


@dataclass(frozen=True)
class Quartiles:
    """Median, first and third quartile of what the rounds gave."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Quartiles:
        """Return the quartiles of values, by linear interpolation between neighbours."""
        ordered = sorted(values)

        def at(share: float) -> float:
            place = share * (len(ordered) - 1)
            below = int(place)
            above = min(below + 1, len(ordered) - 1)
            return ordered[below] + (place - below) * (ordered[above] - ordered[below])

        return cls(at(0.5), at(0.25), at(0.75))


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
        settings=_texts(fields.get("settings")),
        machine=_texts(fields.get("machine")),
        rates=[rate for rate in rates if rate is not None],
    )


def table(bench: Benchmark) -> list[tuple[str, str, str, str]]:
    """Return rows of text: what, dense, pruned, and pruned / dense with its quartiles."""
    rows = []
    for rate in bench.rates:
        ratio = rate.ratio
        rows.append(
            (
                f"batch {rate.batch}: {rate.what}, {rate.unit}",
                "" if rate.dense is None else figure(rate.dense.median),
                figure(rate.pruned.median),
                "" if ratio is None else f"{ratio.median:.3f} ({ratio.low:.3f}–{ratio.high:.3f})",
            )
        )
    dense = bench.dense or ModelFacts("")
    sizes = [("parameters", dense.params, bench.pruned.params, 1)]
    sizes.append(("weights, MiB", dense.weight_bytes, bench.pruned.weight_bytes, MIB))
    for stage, peak in bench.pruned.peak.items():
        title = {"load": "after loading", "device": "of the device"}.get(stage, f"batch {stage}")
        sizes.append((f"peak memory, {title}, MiB", dense.peak.get(stage), peak, MIB))
    for title, before, after, unit in sizes:
        if after is not None:
            share = f"{after / before:.3f}" if before else ""
            rows.append((title, _whole(before, unit), _whole(after, unit), share))
    return rows


def figure(value: float) -> str:
    """Return a rate to four digits, without an exponent."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def _whole(value: int | None, unit: int) -> str:
    return "" if value is None else f"{value / unit:,.0f}"


def _rate(row: Any) -> Rate | None:
    batch, pruned = count(row.get("batch")), _quartiles(row.get("pruned"))
    if batch is None or pruned is None:
        return None
    dense, ratio = _quartiles(row.get("dense")), _quartiles(row.get("ratio"))
    return Rate(batch, text(row.get("what"), 40), text(row.get("unit"), 40), pruned, dense, ratio)


def _quartiles(value: Any) -> Quartiles | None:
    found = [number(mapping(value).get(name)) for name in ("median", "low", "high")]
    if any(each is None or each < 0 for each in found):
        return None
    return Quartiles(*found)


def _model(value: Any) -> ModelFacts:
    fields = mapping(value)
    peak = {
        text(stage, 10): found
        for stage, each in list(mapping(fields.get("peak")).items())[:MOST_ROWS]
        if (found := count(each)) is not None
    }
    name = text(fields.get("name"), 200)
    return ModelFacts(name, count(fields.get("params")), count(fields.get("weight_bytes")), peak)


def _texts(value: Any) -> dict[str, str]:
    return {text(k, 40): text(v, 100) for k, v in list(mapping(value).items())[:MOST_ROWS]}
