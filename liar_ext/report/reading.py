"""Read a report, or a benchmark, that a stranger may have written: the file, and its parts.

A field that is missing, or no value of its kind, is None or left out: a page says "not measured"
there, or "–".
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from liar_ext.checkpoint.folder import REPORT_JSON
from liar_ext.measure.latency_table import LatencyTable
from liar_ext.measure.speed import BENCH_VERSION, Benchmark, ModelFacts, Quartiles, Rate
from liar_ext.recipe import Recipe
from liar_ext.reconstruction.rows import SiteRow
from liar_ext.report.sections import LIKENESS, PAIRS
from liar_ext.report.tables import MEASURES
from liar_ext.system import untrusted
from liar_ext.system.errors import InputError, refusing
from liar_ext.system.untrusted import count, listing, mapping, named, number, record, text

MOST_LINES = 200  # of warnings, notes, and jobs
MOST_POINTS = 1000  # of a curve
MOST_RATES = 100  # of a benchmark


def read_report(folder: str | os.PathLike[str], operation: str) -> tuple[dict[str, Any], str]:
    """Return the fields of a folder's report, and its SHA-256; InputError if it has none."""
    path = Path(folder)
    found = path / REPORT_JSON
    with refusing(f"{operation}: {path} can't be read", "", OSError, ValueError):
        is_folder, is_report = path.is_dir(), found.is_file()
    if not is_folder:
        raise InputError(f"{operation}: {path} is no folder; give one that liar prune wrote")
    if not is_report:
        raise InputError(
            f"{operation}: {path} has no {REPORT_JSON}; give a folder that liar prune wrote, "
            "or save_pruned with report="
        )
    return untrusted.read_object(found, operation)


def report_digest(folder: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a folder's report, "" if it has none."""
    try:
        return read_report(folder, "report")[1]
    except InputError:
        return ""


def numbers(value: Any) -> dict[str, float]:
    """Read names and numbers of at least 0."""
    found = {key: _at_least_zero(each) for key, each in named(value).items()}
    return {key: each for key, each in found.items() if each is not None}


def lines(value: Any) -> list[str]:
    """Read a list of sentences."""
    return [text(each) for each in listing(value)[:MOST_LINES]]


def row(value: Any) -> SiteRow:
    """Read what happened at a site."""
    read = {"int": count, "float": _finite_or_inf, "str": lambda each: text(each, 200)}
    known, kinds = mapping(value), {each.name: each.type for each in fields(SiteRow)}
    return SiteRow(
        **{n: read[kind.removesuffix(" | None")](known.get(n)) for n, kind in kinds.items()}
    )


def job(value: Any) -> dict[str, Any]:
    """Read a job that had pruned the model before."""
    params = [count(each) for each in listing(mapping(value).get("params"))]
    known = {"params": params} if len(params) == 2 and None not in params else {}
    return {"budget": named(mapping(value).get("budget")), **known}


def settings(value: Any) -> dict[str, Any]:
    """Read how the job was done, with the divergences that decided it."""
    found, known = named(value), mapping(value)
    return {n: named(known[n]) if isinstance(known.get(n), Mapping) else found[n] for n in found}


def grid(value: Any) -> dict[str, Any]:
    """Read the steps of sizes; empty if there are none."""
    facts, hidden_size = mapping(value), ("units", "step", "kept", "kept_at_tile_1")
    counts = dict.fromkeys(("layers", "units", "step", "least_kept", "most_kept"), count)
    rows = [record(each, kind=text, unit=text, **counts) for each in listing(facts.get("sites"))]
    hidden = record(facts.get("hidden"), **dict.fromkeys(hidden_size, count))
    found = {"sites": [each for each in rows[:MOST_LINES] if each], "hidden": hidden}
    if not any(found.values()):
        return {}
    for name in ("kept", "predicted_divergence"):
        both = dict.fromkeys((name, f"{name}_at_tile_1"), number)
        found |= record(facts, **both) or {}
    words = {"tile": named(facts).get("tile"), "objective": text(facts.get("objective"))}
    return {**found, **words, "notes": lines(facts.get("notes"))}


def latency(value: Any) -> dict[str, Any]:
    """Read what a plan takes of the dense model's seconds; empty if that is not known."""
    facts, quartiles = mapping(value), dict.fromkeys(("median", "low", "high"), _positive)
    found = record(facts, dense_seconds=_positive, predicted=_positive)
    try:
        table = LatencyTable.from_dict(mapping(facts.get("table"))).to_dict()
    except InputError:
        return {}
    measured = record(facts.get("measured"), **quartiles)
    return {} if found is None else {**found, "measured": measured, "table": table}


def evaluation(value: Any) -> dict[str, dict[str, float]]:
    """Read what was measured of the whole model."""
    found = {}
    for name, known in {"dense": MEASURES, "pruned": MEASURES, "certified": {"divergence"}}.items():
        stored = mapping(value).get(name)
        facts = numbers(stored)
        for signed in ("cosine", "correlation"):  # which may be negative
            facts |= record(stored, **{signed: number}) or {}
        if facts.keys() & known and facts.get("perplexity") != 0:
            found[name] = facts
    return found


def healing(value: Any) -> dict[str, Any]:
    """Read what training did; empty if the model was not healed."""
    facts = mapping(value)
    if not facts:
        return {}
    points = [listing(each) for each in listing(facts.get("curve"))[:MOST_POINTS]]
    return {
        **named({key: each for key, each in facts.items() if key != "curve"}),
        **{name: number(facts.get(name)) for name in ("before", "after", "seconds")},
        "improved": facts.get("improved") is True,
        "tokens": count(facts.get("tokens")),
        "curve": [[count(p[0]), number(p[1])] for p in points if len(p) == 2],
        "quality": _of_three(facts.get("quality")),
        "notes": lines(facts.get("notes")),
    }


def _of_three(value: Any) -> dict[str, list[float]]:
    """Read measures of a dense, a pruned and a healed model."""
    rows = {name: listing(mapping(value).get(name)) for name in MEASURES if name in mapping(value)}
    return {name: [number(each) for each in row] for name, row in rows.items() if len(row) == 3}


def vocabulary(value: Any) -> dict[str, Any]:
    """Read what a smaller vocabulary changes; empty if that is not known."""
    facts = mapping(value)
    found = record(facts, before=count, after=count, kind=text, kept_of_text=number)
    if not found or not found["before"]:
        return {}
    read = {"alike_lines": count(facts.get("alike_lines")), "text": lines(facts.get("text"))[:20]}
    read["tokens_per_byte"] = _pair(facts.get("tokens_per_byte"))
    auto = mapping(facts.get("auto"))
    if judged_by := text(auto.get("judged_by")):
        steps = [_step(listing(each)) for each in listing(auto.get("curve"))[:MOST_POINTS]]
        most = number(auto.get("most_loss"))
        read["auto"] = {"judged_by": judged_by, "most_loss": most, "curve": steps}
    if held_out := _held_out(facts.get("held_out")):
        pruned = _held_out(mapping(facts["held_out"]).get("pruned"))
        read["held_out"] = held_out | ({"pruned": pruned} if pruned else {})
    return {**found, **read}


def _held_out(value: Any) -> dict[str, Any]:
    facts = mapping(value)
    known = {name: number(facts.get(name)) for name in LIKENESS}
    known |= {name: _pair(facts.get(name)) for name in PAIRS if name in facts}
    return {name: each for name, each in known.items() if each is not None}


def recipe(value: Any) -> Recipe | Mapping[str, Any]:
    """Read a recipe: what the file says of it, if it is no whole recipe of this version."""
    try:
        found = Recipe.from_dict(mapping(value))
    except InputError:
        return named(value)
    return found if found.to_dict() == value else named(value)


def _at_least_zero(value: Any) -> float | None:
    return None if number(value) is None or value < 0 else value


def _positive(value: Any) -> float | None:
    return _at_least_zero(value) or None


def _finite_or_inf(value: Any) -> float | None:
    return math.inf if value == "inf" else _at_least_zero(value)


def _step(values: list[Any]) -> list[float | None]:
    """Read tokens, loss, tokens per byte, and what is kept in all, of a size that was tried."""
    tokens, loss, rate, kept = (*values[:4], None, None, None, None)[:4]
    return [count(tokens), math.inf if loss == "inf" else number(loss), number(rate), number(kept)]


def _pair(value: Any) -> list[float | None]:
    found = [number(each) for each in listing(value)[:2]]
    return found + [None] * (2 - len(found))


def bench_file(folder: str | os.PathLike[str]) -> Path:
    """Return where the benchmark of a folder is stored: beside it, for the folder is sealed."""
    path = Path(os.path.realpath(folder))
    return path.with_name(f"{path.name}.bench.json")


def read_bench(path: Path) -> Benchmark:
    """Return a stored benchmark; what is missing, or no number, is left out.

    InputError if the file is none.
    """
    fields, _ = untrusted.read_object(path, "report")
    if fields.get("version") != BENCH_VERSION or not isinstance(fields.get("rates"), list):
        raise InputError(
            f"report: {path} is no benchmark of version {BENCH_VERSION}; write it by liar bench"
        )
    rates = [_stored_rate(mapping(row)) for row in listing(fields["rates"])[:MOST_RATES]]
    return Benchmark(
        pruned=_model(fields.get("pruned")),
        dense=_model(fields.get("dense")),
        report_digest=text(fields.get("report_digest"), 64),
        settings=named(fields.get("settings")),
        machine=named(fields.get("machine")),
        rates=[rate for rate in rates if rate is not None],
    )


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


def _stored_rate(row: Any) -> Rate | None:
    timed = [_quartiles(row.get(name)) for name in ("pruned", "dense", "ratio")]
    batch, what, unit = count(row.get("batch")), row.get("what"), row.get("unit")
    return None if None in (batch, *timed) else Rate(batch, text(what, 40), text(unit, 40), *timed)


def _quartiles(value: Any) -> Quartiles | None:
    found = record(value, **dict.fromkeys(("median", "low", "high"), number))
    return Quartiles(**found) if found and min(found.values()) >= 0 else None


def _model(value: Any) -> ModelFacts:
    facts = mapping(value)
    peak = {key: each for key, each in named(facts.get("peak")).items() if count(each) is not None}
    sizes = (count(facts.get(name)) for name in ("params", "weight_bytes"))
    return ModelFacts(text(facts.get("name"), 200), *sizes, peak)


PARTS: dict[str, Callable[[Any], Any]] = {  # of a report, but for its sites
    "model": lambda value: text(value, 200),
    **dict.fromkeys(("budget", "versions"), named),
    "settings": settings,
    "earlier": lambda value: [job(each) for each in listing(value)],
    "grid": grid,
    "params": numbers,
    "latency": latency,
    "evaluation": evaluation,
    "heal": healing,
    "vocabulary": vocabulary,
    "seconds": numbers,
    "warnings": lines,
    "loading": lambda value: text(value, 1000),
    "recipe": lambda value: recipe(value) or None,
}
