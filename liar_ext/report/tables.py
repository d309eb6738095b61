"""The tables of a report: one model of a table, its forms, and a function for each table.

:func:`to_text` and :func:`to_markdown` are forms, ``table.html`` is the one for HTML.
The facts that tables are made of may have been read from a file: a number that is missing is shown
as "–".
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from liar_ext.measure.timing import Benchmark, ModelFacts
from liar_ext.rows import SiteRow
from liar_ext.untrusted import text

MIB = 2**20
SIZES = {"parameters": "", "prunable parameters": "prunable_"}  # title, and what keys begin with
BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
RATIO = ("", "dense", "pruned", "pruned / dense")
MEASURES = {  # of the whole model on held-out inputs, and what they are
    "perplexity": "perplexity",
    "cosine": "cosine with the dense embeddings",
    "neighbours": "shared part of the ten nearest neighbours",
    "agreement": "agreement with the dense predictions",
    "divergence": "divergence from the dense predictions",
}
ERRORS = (
    "Errors are relative to the energy of the dense output. Held out: solved on one half of the "
    "calibration documents and measured on the other; the regularisation is chosen by it, and "
    "importance scores have seen both halves."
)


@dataclass(frozen=True)
class Table:
    """A table whose cells are text already."""

    title: str
    columns: Sequence[str]  # heads; all empty for a table of names and values
    rows: Sequence[Sequence[str]]  # cells, as many in each row as there are columns
    text_columns: Sequence[int] = (0,)  # aligned left; the others hold numbers
    note: str = ""  # sentences that stand before it


def to_text(table: Table) -> list[str]:
    """Return the lines of a table in columns of equal width, without title and notes."""
    rows = [table.columns, *table.rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = ["<" if at in table.text_columns else ">" for at in range(len(widths))]
    return ["  ".join(map("{:{}{}}".format, row, sides, widths)).rstrip() for row in rows]


def to_markdown(table: Table) -> list[str]:
    """Return the lines of a table with its note, without its title."""
    rule = ["---" if at in table.text_columns else "---:" for at in range(len(table.columns))]
    rows = [table.columns, rule, *table.rows]
    lines = [f"| {' | '.join(map(in_markdown, row))} |" for row in rows]
    return [in_markdown(table.note), "", *lines] if table.note else lines


def in_markdown(value: str) -> str:
    """Return text that is no markup of Markdown's or HTML's, on one line."""
    return " ".join(value.split()).replace("<", "&lt;").replace("|", "&#124;")


def plain(value: str) -> str:
    """Return text of a stranger as one line of Markdown that shows it as it is."""
    line = "".join(each if each.isprintable() else "\ufffd" for each in " ".join(value.split()))
    return re.sub(r"([\\`&#|\[\]])", r"\\\1", line).replace("<", "&lt;")


def figure(value: float | None, form: str = ".3g") -> str:
    """Return a number as a person reads it, "–" for None."""
    return "–" if value is None else format(value, form)


def quality(value: float | None) -> str:
    """Return a perplexity, or another of the measures, as text."""
    return figure(value, ".2f" if value is not None and 1 < value < 1e4 else ".4g")


def rate(value: float | None) -> str:
    """Return a rate to four digits, without an exponent."""
    return figure(value, ",.0f" if value is not None and value >= 1000 else ".4g")


def ratio(before: float | None, after: float | None) -> str:
    """Return ``after / before`` as text, "" where that is no number."""
    return f"{after / before:.3f}" if before and after is not None else ""


def pair(before: int | None, after: int | None) -> str:
    """Return a count before and after, once if it is the same."""
    counts = figure(before, ","), figure(after, ",")
    return counts[0] if before == after else " → ".join(counts)


def magnitude(value: float) -> str:
    """Return a count in millions or billions, as models are named by."""
    for unit, word in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:.4g}\u00a0{word}"
    return f"{value:,}"


def megabytes(params: float, dtype: str) -> str:
    """Return how large so many weights are, in units of 10⁶ bytes."""
    return f"{params * BYTES[dtype] / 1e6:,.1f}\u00a0MB"


def cost(evaluation: Mapping) -> str:
    """Return what pruning cost in quality, in a few words; "" if it was not measured."""
    for name, before, after in measures(evaluation):
        if name == "perplexity":
            change = after / before - 1
            return f"perplexity {abs(change):,.0%} {'lower' if change < 0 else 'higher'}"
        return f"{name} {figure(after)}"
    certified = evaluation.get("certified")
    return f"divergence {figure(certified['divergence'])}" if certified else ""


def measured_on(found: Mapping[str, float]) -> str:
    """Return what a measure was measured on."""
    if "perplexity" not in found and "sequences" in found:
        longest = f" of at most {found['seq_len']} tokens" if "seq_len" in found else ""
        return f"{found['sequences']:,} inputs{longest}"
    if "tokens" not in found or "seq_len" not in found:
        return "text of unknown length"
    return f"{found['tokens']:,} tokens in windows of {found['seq_len']}"


def measures(evaluation: Mapping[str, Mapping[str, float]]) -> list[tuple[str, float, float]]:
    """Return the names of what was measured of both models, with the dense and pruned numbers."""
    dense, pruned = (evaluation.get(of, {}) for of in ("dense", "pruned"))
    both = [name for name in MEASURES if name in dense and name in pruned]
    return [(name, dense[name], pruned[name]) for name in both]


def sizes(params: Mapping, evaluation: Mapping, latency: Mapping, dtype: str = "") -> Table:
    """Return what the model was and is: parameters, time, measures, divergence."""
    rows = []
    for title, part in SIZES.items():
        before, after = params.get(f"{part}before"), params.get(f"{part}after")
        if before and after is not None:
            rows.append((title, f"{before:,}", f"{after:,}", ratio(before, after)))
            if dtype in BYTES and not part:
                weights = (megabytes(count, dtype) for count in (before, after))
                rows.append((f"weights, {dtype}", *weights, ratio(before, after)))
    if latency and latency["measured"]:
        title = f"time of {latency['table']['phase']}, as measured before saving"
        rows.append((title, "", "", f"{latency['measured']['median']:.3f}"))
    for name, before, after in measures(evaluation):
        title = f"{MEASURES[name]}, {measured_on(evaluation['dense'])}"
        rows.append((title, quality(before), quality(after), ratio(before, after)))
    certified = evaluation.get("certified")
    if certified:
        title = (
            f"divergence from the dense model, {figure(certified.get('rows'), ',')} outputs no "
            "decision has seen: KL in nats, or without logits half the squared relative distance"
        )
        rows.append((title, "0", figure(certified["divergence"]), ""))
    return Table("Sizes and quality", RATIO, rows)


def sites(title: str, rows: Sequence[SiteRow]) -> Table:
    """Return a row for each site, or each place where hidden features are read."""
    has_certified = any(row.certified_error is not None for row in rows)
    certified = ("certified",) if has_certified else ()
    heads = ("site", "units", "parameters", "damp", "error", "held out", *certified)
    cells = [
        (
            row.name,
            pair(row.units_before, row.units_after),
            pair(row.params_before, row.params_after),
            "drop" if row.damp == math.inf else figure(row.damp, ".0e"),
            figure(row.error),
            figure(row.holdout_error),
            *(figure(row.certified_error) for _ in certified),
            figure(row.condition, ".0e"),
            figure(row.dropped_rows, ","),
            row.path,
            f"{row.share:.2f} {row.target}" if row.share else "dense-input",
            figure(row.seconds, ".1f"),
        )
        for row in rows
    ]
    said = ERRORS + has_certified * " Certified: measured on text that no decision has seen."
    heads += ("condition", "dropped rows", "path", "target", "s")
    return Table(title, heads, cells, (0, len(heads) - 3, len(heads) - 2), said)


def latency_lines(found: Mapping[str, Any]) -> list[str]:
    """Return lines on how much faster a plan is, for a budget of latency."""
    if not found:
        return []
    table, measured = found["table"], found["measured"]
    what = table["phase"] if table["phase"] != "both" else "prefill and decode"
    asked = f"batch {table['batch']}, prompt of {table['prompt']} tokens"
    if table["phase"] != "prefill":
        asked += f", {table['new_tokens']} new ones"
    place = ", ".join(
        f"{table['where'][key]}{' threads' if key == 'threads' else ''}"
        for key in ("device", "dtype", "threads")
        if key in table["where"]
    )
    fast = f"×{1 / found['predicted']:.3f} predicted"
    if measured:
        low, high = 1 / measured["high"], 1 / measured["low"]
        fast += f", ×{1 / measured['median']:.3f} measured ({low:.3f}–{high:.3f})"
    outside = table["fixed"] / found["dense_seconds"]
    return [
        f"{fast} ({what}, {asked}; the table is of {place})",
        f"{1000 * found['dense_seconds']:.4g} ms dense, of which {outside:.1%} lie outside of what "
        "can be pruned",
    ]


def latency(found: Mapping[str, Any]) -> Table:
    """Return milliseconds by units kept, for a budget of latency."""
    table, rows = found["table"], []
    for row in table["rows"]:
        some = zip(row["counts"], row["seconds"], row["spread"], strict=True)
        times = [f"{n}: {1000 * s:.3g} (±{1000 * spread:.1g})" for n, s, spread in some]
        unit = row["unit"].replace("_", " ")
        rows.append((f"{row['sites']} {row['kind']}, {unit}s", ", ".join(times)))
    heads = "sites", "units kept: milliseconds of one site (half of the distance between quartiles)"
    notes = [f"{line}." for line in latency_lines(found)]
    notes.append(f"A whole plan saved {table['scale']:.3f} times what its sites add up to.")
    return Table("Latency", heads, rows, (0, 1), " ".join(notes))


def grid(found: Mapping[str, Any]) -> Table:
    """Return the steps that sizes are counted in; what they cost is in the note."""
    rows, notes = [], [f"Tile {found['tile']}."]
    for row in found.get("sites", ()):
        least, most = row["least_kept"], row["most_kept"]
        title = f"{row['layers']} {row['kind']} layers, {row['unit'].replace('_', ' ')}s"
        kept = f"{most}" if least == most else f"{least} to {most}"
        rows.append((title, f"{row['units']}", f"{row['step']}", kept))
    hidden = found.get("hidden")
    if hidden:
        rows.append(("hidden features", *(f"{hidden[key]}" for key in ("units", "step", "kept"))))
        notes.append(f"With tile 1 {hidden['kept_at_tile_1']} hidden features would stay.")
    if "kept" in found:
        kept = f"{found['kept']:.4f} on the grid, {found['kept_at_tile_1']:.4f} with tile 1"
        cost = f"; {_cost(found)}" if "predicted_divergence" in found else ""
        notes.append(f"Kept of the budget's cost: {kept}.")
        notes.append(f"What the allocation minimises: {found['objective']}{cost}.")
    notes += found.get("notes", ())
    return Table("Grid of sizes", ("", "dense", "in steps of", "kept"), rows, (0,), " ".join(notes))


def grid_lines(found: Mapping[str, Any]) -> list[str]:
    """Return a line on the steps of sizes and what they cost, if a step is more than a unit."""
    rows = [row for row in found.get("sites", ()) if row["unit"] == "channel"]
    steps = sorted({row["step"] for row in rows if row["step"] > 1})
    said = [f"MLP channels in steps of {', '.join(map(str, steps))}"] if steps else []
    hidden = found.get("hidden")
    if hidden:
        kept = f"{hidden['kept']} stay, with tile 1 {hidden['kept_at_tile_1']}"
        said.append(f"hidden features in steps of {hidden['step']}: {kept}")
    if said and "predicted_divergence" in found:
        said.append(f"predicted divergence {_cost(found)}")
    elif said and "kept" in found:
        said.append(f"kept {found['kept']:.4f}, with tile 1 {found['kept_at_tile_1']:.4f}")
    return ["; ".join(said)] if said else []


def _cost(found: Mapping[str, Any]) -> str:
    on_grid, single = found["predicted_divergence"], found["predicted_divergence_at_tile_1"]
    return f"{figure(on_grid)} on the grid, {figure(single)} with tile 1"


def facts(title: str, found: Mapping[str, Any], note: str = "") -> Table:
    """Return names and values."""
    return Table(title, ("", ""), [(k, text(v)) for k, v in found.items()], (0, 1), note)


def earlier_job(job: Mapping[str, Any]) -> str:
    """Return what a job did that had pruned the model before."""
    keep = job.get("budget", {}).get("keep")
    return f"{pair(*job.get('params', (None, None)))} parameters (keep {text(keep)})"


def speed(bench: Benchmark | None) -> Table:
    """Return what was timed, of both models and as their ratio, and what they take of memory."""
    rows, title = [], "Speed and memory"
    if bench is None:
        return Table(title, RATIO, rows)
    for each in bench.rates:
        found = each.ratio
        rows.append(
            (
                f"batch {each.batch}: {each.what}, {each.unit}",
                "" if each.dense is None else rate(each.dense.median),
                rate(each.pruned.median),
                "" if found is None else f"{found.median:.3f} ({found.low:.3f}–{found.high:.3f})",
            )
        )
    dense = bench.dense or ModelFacts("")
    counts = [("parameters", dense.params, bench.pruned.params, 1)]
    counts.append(("weights, MiB", dense.weight_bytes, bench.pruned.weight_bytes, MIB))
    for stage, peak in bench.pruned.peak.items():
        what = {"load": "after loading", "device": "of the device"}.get(stage, f"batch {stage}")
        counts.append((f"peak memory, {what}, MiB", dense.peak.get(stage), peak, MIB))
    for what, before, after, unit in counts:
        if after is not None:
            left = "" if before is None else f"{before / unit:,.0f}"
            rows.append((what, left, f"{after / unit:,.0f}", ratio(before, after)))
    settings = bench.settings | bench.machine
    said = "; ".join(f"{key} {text(value)}" for key, value in settings.items())
    against = f"Dense: {bench.dense.name}. " if bench.dense else ""
    note = f"{against}Medians of alternating rounds, ratios with their quartiles; {said}"
    return Table(title, (*RATIO[:3], "pruned / dense (quartiles)"), rows, (0,), note)
