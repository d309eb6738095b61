"""Read a saved report as what a stranger may have written: bounded, typed, cleaned.

A field that is missing, or is no value of its kind, is None or absent: a page says "not measured"
there. Nothing of a file reaches a page or a picture but through :func:`text` and :func:`number`.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from liar_ext.errors import InputError, one_line
from liar_ext.report.report import REPORT_JSON

REPORT_NAMES = (REPORT_JSON, "liar_report.json")  # the second: of version 0.1.0
MOST_BYTES = 64 << 20  # a report of 10⁵ sites takes some 40 MB
MOST_SITES = 4096
MOST_FACTS = 200  # of a table of names and values
MOST_TEXT = 400  # characters of one value
LARGEST = 2**53  # of a count: what a double says exactly
SITE_NAME = re.compile(
    r"(?:(\w{1,20})\.)?(\d{1,6})\.(?:cross_|shared_)?([a-z]\w{0,19})(?:\.\d{1,6})?"
)


@dataclass(frozen=True)
class SavedSite:
    """A row of a saved report; None is what it doesn't say. See :class:`SiteRow` for the fields."""

    name: str
    block: int | None
    kind: str
    units_before: int | None
    units_after: int | None
    params_before: int | None
    params_after: int | None
    error: float | None
    holdout_error: float | None
    certified_error: float | None
    sensitivity: float | None
    damp: float | None
    seconds: float | None

    @property
    def is_pruned(self) -> bool:
        """Whether units were removed, as far as the report says."""
        known = self.units_before is not None and self.units_after is not None
        return known and self.units_after < self.units_before


@dataclass(frozen=True)
class Perplexity:
    """A perplexity and what it was measured on."""

    value: float
    tokens: int | None
    seq_len: int | None


@dataclass(frozen=True)
class SavedReport:
    """A report as it was read from a folder.

    Parameters
    ----------
    folder, model : str
        Names: of the folder, and of the model that was pruned.
    digest : str
        SHA-256 of the file, by which a stored measurement knows the folder that it is of.
    sites, hidden : tuple of SavedSite
        At most ``MOST_SITES`` each.
    params : dict of str to int
        Those of ``before``, ``after``, ``prunable_before``, ``prunable_after`` that are there.
    dense, pruned : Perplexity or None
        Before and after.
    divergence : tuple of float and int, or None
        Certified divergence from the dense model in nats, and over how many outputs.
    seconds : dict of str to float
        By stage, without ``total``.
    total : float or None
        Seconds of the whole job.
    facts : dict of str to dict of str to str
        Budget, settings, versions and recipe, as text.
    warnings : tuple of str
        Of the job.
    loading : str
        Which loaders take the folder.
    notes : tuple of str
        What of the file could not be shown.
    """

    folder: str
    model: str
    digest: str
    sites: tuple[SavedSite, ...]
    hidden: tuple[SavedSite, ...]
    params: dict[str, int]
    dense: Perplexity | None
    pruned: Perplexity | None
    divergence: tuple[float, int | None] | None
    seconds: dict[str, float]
    total: float | None
    facts: dict[str, dict[str, str]]
    warnings: tuple[str, ...]
    loading: str
    notes: tuple[str, ...]


def read_report(folder: str | os.PathLike[str], operation: str = "report") -> SavedReport:
    """Return the report of a saved folder, of this version or an older one.

    Raises
    ------
    InputError
        If the folder has none, or it is no JSON object that can be read.
    """
    path = find_report(folder, operation)
    fields, digest = read_object(path, operation)
    notes: list[str] = []
    evaluation = mapping(fields.get("evaluation"))
    certified = mapping(evaluation.get("certified"))
    divergence = number(certified.get("divergence"))
    seconds = {
        text(stage, 40): spent
        for stage, value in list(mapping(fields.get("seconds")).items())[:MOST_FACTS]
        if (spent := number(value)) is not None and spent >= 0
    }
    params = {
        name: value
        for name in ("before", "after", "prunable_before", "prunable_after")
        if (value := count(mapping(fields.get("params")).get(name))) is not None
    }
    warnings = [text(each) for each in listing(fields.get("warnings"))[:MOST_FACTS]]
    return SavedReport(
        folder=text(Path(folder).resolve().name or str(folder), 100),
        model=text(fields.get("model"), 200),
        digest=digest,
        sites=_sites(fields.get("sites"), "sites", notes),
        hidden=_sites(fields.get("hidden"), "places of hidden features", notes),
        params=params,
        dense=_perplexity(evaluation.get("dense")),
        pruned=_perplexity(evaluation.get("pruned")),
        divergence=None if divergence is None else (divergence, count(certified.get("rows"))),
        total=seconds.pop("total", None),
        seconds=seconds,
        facts=_facts(fields),
        warnings=tuple(warnings),
        loading=text(fields.get("loading"), 1000),
        notes=tuple(notes),
    )


def find_report(folder: str | os.PathLike[str], operation: str) -> Path:
    """Return the path of a folder's report.

    Raises
    ------
    InputError
        If there is no such folder, or no report in it.
    """
    path = Path(folder)
    try:
        is_folder = path.is_dir()
        found = next((path / name for name in REPORT_NAMES if (path / name).is_file()), None)
    except (OSError, ValueError) as error:
        raise InputError(f"{operation}: {path} can't be read: {one_line(error)}") from error
    if not is_folder:
        raise InputError(f"{operation}: {path} is no folder; give one that liar prune wrote")
    if found is None:
        raise InputError(
            f"{operation}: {path} has no {REPORT_NAMES[0]}; give a folder that liar prune wrote, "
            "or save_pruned with report="
        )
    return found


def read_object(path: Path, operation: str) -> tuple[dict[str, Any], str]:
    """Return the object of a JSON file, and the SHA-256 of the file.

    Raises
    ------
    InputError
        If it is no ordinary file, too large, too deep, or no JSON object.
    """
    if not os.path.lexists(path):
        raise InputError(f"{operation}: there is no file {path}")
    try:
        if not path.is_file():
            raise ValueError("it is no ordinary file")
        with open(path, "rb") as file:
            data = file.read(MOST_BYTES + 1)
        if len(data) > MOST_BYTES:
            raise ValueError(f"it has more than {MOST_BYTES:,} bytes, which no report has")
        value = json.loads(data.decode("utf-8"))
        if not isinstance(value, dict):
            raise ValueError(f"it is a {type(value).__name__} and no object")
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"{operation}: {path} can't be read: {one_line(error)}; copy it again"
        ) from error
    return value, hashlib.sha256(data).hexdigest()


def text(value: Any, most: int = MOST_TEXT) -> str:
    """Return a value as printable text of bounded length; "" of None."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list | dict):
        flat = len(value) <= most and not any(isinstance(each, list | dict) for each in value)
        value = ", ".join(map(str, value)) if flat else f"{len(value):,} entries"
    said = str(value)[: most + 1] if not isinstance(value, int) or abs(value) < LARGEST else "?"
    said = "".join(each if each.isprintable() else "\ufffd" for each in said)
    return said if len(said) <= most else said[:most] + "…"


def number(value: Any) -> float | None:
    """Return a finite number, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        value = float(value)
    except OverflowError:
        return None
    return value if math.isfinite(value) else None


def count(value: Any) -> int | None:
    """Return an integer of at least 0, or None."""
    number = isinstance(value, int) and not isinstance(value, bool)
    return value if number and 0 <= value < LARGEST else None


def mapping(value: Any) -> Mapping[str, Any]:
    """Return an object, or an empty one."""
    return value if isinstance(value, dict) else {}


def listing(value: Any) -> list[Any]:
    """Return a list, or an empty one."""
    return value if isinstance(value, list) else []


def _sites(value: Any, what: str, notes: list[str]) -> tuple[SavedSite, ...]:
    rows = listing(value)
    if len(rows) > MOST_SITES:
        notes.append(f"Of {len(rows):,} {what} the first {MOST_SITES:,} are shown.")
    return tuple(_site(mapping(row)) for row in rows[:MOST_SITES])


def _site(row: Mapping[str, Any]) -> SavedSite:
    name = text(row.get("name"), 80)
    found = SITE_NAME.fullmatch(name)
    known: dict[str, Any] = {
        "name": name,
        # Layers are counted anew in each part of a model, so that they have no place in one row.
        "block": int(found[2]) if found and found[1] is None else None,
        "kind": found[3] if found else "other",
        # Plain dropping is an infinite λ, which JSON has no number for.
        "damp": math.inf if row.get("damp") == "inf" else number(row.get("damp")),
    }
    for each in fields(SavedSite):
        if each.name not in known:
            read = count if each.type == "int | None" else _at_least_zero
            known[each.name] = read(row.get(each.name))
    return SavedSite(**known)


def _at_least_zero(value: Any) -> float | None:
    value = number(value)
    return value if value is not None and value >= 0 else None


def _perplexity(value: Any) -> Perplexity | None:
    value = mapping(value)
    found = number(value.get("perplexity"))
    if found is None or found <= 0:
        return None
    return Perplexity(found, count(value.get("tokens")), count(value.get("seq_len")))


def _facts(fields: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    recipe = mapping(fields.get("recipe"))
    tables = {"Recipe": recipe} if recipe else {"Budget": mapping(fields.get("budget"))}
    settings = mapping(fields.get("settings"))
    tables["Found" if recipe else "Settings"] = {
        key: value for key, value in settings.items() if key not in recipe
    }
    tables["Latency"] = _latency(mapping(fields.get("latency")))
    jobs = [mapping(each) for each in listing(fields.get("earlier"))[:MOST_FACTS]]
    tables["Pruned before"] = {f"job {at}": _job(job) for at, job in enumerate(jobs, 1)}
    tables["Versions"] = mapping(fields.get("versions"))
    return {
        title: {text(key, 60): text(value) for key, value in list(table.items())[:MOST_FACTS]}
        for title, table in tables.items()
        if table
    }


def _latency(found: Mapping[str, Any]) -> dict[str, str]:
    """Return what a report says of a budget of latency, as text."""
    table, measured = mapping(found.get("table")), mapping(found.get("measured"))
    facts = {
        "dense_seconds": found.get("dense_seconds"),
        "predicted fraction of them": found.get("predicted"),
        "measured fraction of them": measured.get("median"),
        "seconds outside of the sites": table.get("fixed"),
    }
    facts |= {key: table.get(key) for key in ("phase", "batch", "prompt", "new_tokens")}
    facts |= {key: mapping(table.get("where")).get(key) for key in ("device", "dtype", "threads")}
    return {key: value for key, value in facts.items() if value is not None}


def _job(job: Mapping[str, Any]) -> str:
    """Return an earlier job as text: its budget, and parameters before and after."""
    params, budget = mapping(job.get("params")), mapping(job.get("budget"))
    before, after = (count(params.get(name)) for name in ("before", "after"))
    sizes = "" if None in (before, after) else f"{before:,} → {after:,} parameters"
    said = [sizes, *(f"{text(k, 60)} {text(v, 60)}" for k, v in list(budget.items())[:10])]
    return "; ".join(each for each in said if each)
