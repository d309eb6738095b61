"""Read a report, or a benchmark, that a stranger may have written: the file, and its parts."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

from liar_ext.checkpoint.folder import REPORT_JSON, digest
from liar_ext.measure.speed import BENCH_VERSION, Benchmark, ModelFacts, Quartiles, Rate
from liar_ext.models.recipe import Recipe
from liar_ext.reconstruction.solve import SiteRow
from liar_ext.report.sections import speed
from liar_ext.system.errors import InputError
from liar_ext.system.files import count, listing, mapping, number, read_json, text

MOST_NAMES, MOST_ITEMS, MOST_DEPTH = 200, 4096, 8  # of objects and lists
MOST_LINES = 200  # of warnings
# What anything raises that shows facts of another form.
MISFIT = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)


def read_report(folder: str | os.PathLike[str], operation: str) -> dict[str, Any]:
    """Return the fields of a folder's report; InputError if it has none."""
    path = Path(folder, REPORT_JSON)
    if not os.path.isfile(path):
        raise InputError(
            f"{operation}: {folder} has no {REPORT_JSON}; give a folder that liar prune wrote, "
            "or save_pruned with report="
        )
    return read_json(path, operation)


def report_digest(folder: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a folder's report, "" if it has none."""
    with suppress(OSError):
        return digest(Path(os.path.realpath(Path(folder, REPORT_JSON)))) or ""
    return ""


def clean(value: Any, depth: int = MOST_DEPTH) -> Any:
    """Return JSON with printable, short text, and with numbers; what is none is None."""
    if value == "inf":
        return math.inf
    if isinstance(value, str) or not depth:
        return text(value)
    if isinstance(value, dict):
        some = list(value.items())[:MOST_NAMES]
        return {text(key, 60): clean(each, depth - 1) for key, each in some}
    if isinstance(value, list):
        return [clean(each, depth - 1) for each in value[:MOST_ITEMS]]
    return value if isinstance(value, bool) else number(value)


def section(value: Any) -> dict[str, Any]:
    """Read names and whatever values; empty if it is no object."""
    return clean(mapping(value))


def numbers(value: Any) -> dict[str, float]:
    """Read names and finite numbers of at least 0."""
    known = {key: each for key, each in section(value).items() if number(each) is not None}
    return {key: each for key, each in known.items() if each >= 0}


def evaluation(value: Any) -> dict[str, dict[str, float]]:
    """Read what was measured of the whole model.

    Correlations may be negative, and the perplexity of a broken model is infinite.
    """
    found = {
        of: {n: v for n, v in section(each).items() if number(v) is not None or v == math.inf}
        for of, each in mapping(value).items()
    }
    return {of: each for of, each in found.items() if each}


def row(value: Any) -> SiteRow:
    """Read what happened at a site; what is no value of its kind is None."""
    known, kinds = mapping(value), {each.name: each.type for each in fields(SiteRow)}
    read = {"int": count, "float": _size, "str": lambda each: text(each, 200)}
    return SiteRow(
        **{n: read[kind.removesuffix(" | None")](known.get(n)) for n, kind in kinds.items()}
    )


def _size(value: Any) -> float | None:
    found = clean(value)
    return found if isinstance(found, int | float) and found >= 0 else None


def recipe(value: Any) -> Recipe | Mapping[str, Any] | None:
    """Read a recipe: what the file says of it, if it is no whole recipe of this version."""
    try:
        found = Recipe.from_dict(mapping(value))
    except InputError:
        return section(value) or None
    return found if found.to_dict() == value else section(value) or None


def bench_file(folder: str | os.PathLike[str]) -> Path:
    """Return where the benchmark of a folder is stored: beside it, for the folder is sealed."""
    path = Path(os.path.realpath(folder))
    return path.with_name(f"{path.name}.bench.json")


def read_bench(path: Path) -> Benchmark:
    """Return a stored benchmark; InputError if the file is none."""
    facts = section(read_json(path, "report"))
    try:
        found = Benchmark(
            pruned=_model(**facts["pruned"]),
            dense=_model(**facts["dense"]),
            report_digest=facts["report_digest"],
            settings=section(facts["settings"]),
            machine=section(facts["machine"]),
            rates=[_rate(**each) for each in facts["rates"]],
        )
        speed(found)
    except MISFIT:
        found = None
    if found is None or facts.get("version") != BENCH_VERSION:
        raise InputError(
            f"report: {path} is no benchmark of version {BENCH_VERSION}; write it by liar bench"
        )
    return found


def _model(name: str, params: int, weight_bytes: int, peak: Any) -> ModelFacts:
    return ModelFacts(text(name, 200), count(params), count(weight_bytes), numbers(peak))


def _rate(batch: int, what: str, unit: str, **timed: Mapping[str, float]) -> Rate:
    found = {name: Quartiles(**numbers(each)) for name, each in timed.items()}
    return Rate(int(batch), text(what, 40), text(unit, 40), **found)


def stored_bench(folder: str | os.PathLike[str]) -> tuple[Benchmark | None, list[str]]:
    """Return the benchmark that is stored beside a folder, and what is wrong with it.

    One of another state of the folder, or one that can't be read, is told of and not used.
    """
    path = bench_file(folder)
    if not os.path.lexists(path):
        return None, []
    try:
        bench = read_bench(path)
    except InputError as error:
        return None, [f"The stored benchmark is left out: {error}"]
    if bench.report_digest != report_digest(folder):
        return None, [
            f"The stored benchmark {path.name} is of another state of this folder and is left out; "
            "run liar bench again."
        ]
    return bench, []


PARTS = {  # of a report, but for its sites
    "model": lambda value: text(value, 200),
    **dict.fromkeys(("budget", "settings", "versions", "grid", "latency", "heal"), section),
    "vocabulary": section,
    **dict.fromkeys(("params", "seconds"), numbers),
    "evaluation": evaluation,
    "earlier": lambda value: clean(listing(value)),
    "warnings": lambda value: [text(each) for each in listing(value)[:MOST_LINES]],
    "loading": lambda value: text(value, 1000),
    "recipe": recipe,
}
