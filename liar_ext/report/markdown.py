"""The report as a person reads it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from liar_ext.rows import SiteRow

if TYPE_CHECKING:
    from liar_ext.report.report import Report


def page(report: Report) -> list[str]:
    """Return the lines of the whole report."""
    lines = [f"# Pruning report: {report.model}", "", *size_table(report)]
    if report.earlier:
        lines += ["", *(f"{line}." for line in _earlier(report))]
    if report.loading:
        lines += ["", report.loading]
    if report.latency:
        lines += ["", "## Latency", "", *(f"{line}." for line in latency(report.latency))]
        lines += ["", *latency_table(report.latency["table"])]
    if report.grid:
        lines += ["", "## Grid of sizes", "", *grid_table(report.grid)]
    if report.warnings:
        lines += ["", "## Warnings", "", *(f"- {warning}" for warning in report.warnings)]
    for title, rows in (("Sites", report.sites), ("Hidden features", report.hidden)):
        if rows:
            lines += ["", f"## {title}", "", *site_table(rows)]
    facts = {"Budget": report.budget, "Settings": report.settings}
    if report.recipe is not None:
        lines += ["", "## Recipe", "", "Repeat the run by `liar prune --recipe FILE --out DIR`,"]
        lines += ["FILE holding the lines below: `liar/recipe.yaml` of the saved folder.", ""]
        lines += ["```yaml", *report.recipe.to_yaml().splitlines(), "```"]
        asked = report.recipe.to_dict()
        found = {key: value for key, value in report.settings.items() if key not in asked}
        facts = {"Found": {key: figure(value) for key, value in found.items()}}
    seconds = {key: f"{value:.1f}" for key, value in report.seconds.items()}
    facts |= {"Seconds": seconds, "Versions": report.versions}
    for title, table in facts.items():
        lines += ["", f"## {title}", "", *fact_table(table)]
    return lines


def summary(report: Report) -> list[str]:
    """Return a few lines of plain text: sizes, perplexity, errors, how to load, warnings."""
    lines = _earlier(report)
    for title, before, after in _sizes(report):
        lines.append(f"{title:20} {before:>15,} → {after:>15,}  ({after / before:.1%})")
    dense, pruned = report.evaluation.get("dense"), report.evaluation.get("pruned")
    if dense and pruned:
        lines.append(
            f"{'perplexity':20} {dense['perplexity']:>15.2f} → {pruned['perplexity']:>15.2f}  "
            f"({dense['tokens']:,} tokens in windows of {dense['seq_len']})"
        )
    certified = report.evaluation.get("certified")
    if certified:
        lines.append(
            f"{'certified divergence':20} {figure(certified['divergence']):>15} from the dense "
            f"model, over {certified['rows']:,} outputs that no decision has seen"
        )
    lines += [f"{'latency':20} {line}" for line in latency(report.latency)]
    lines += [f"{'sizes':20} {line}" for line in _steps(report.grid)]
    cut = [row for row in report.sites if row.units_after < row.units_before]
    if cut:
        worst = max(cut, key=lambda row: row.holdout_error)
        lines.append(
            f"{'error of a site':20} {worst.holdout_error:.2%} at most, at {worst.name}, of its "
            "output's energy (cross-validated)"
        )
    fresh = [row for row in cut if row.certified_error is not None]
    if fresh:
        worst = max(fresh, key=lambda row: row.certified_error)
        lines.append(f"{'':20} {worst.certified_error:.2%} at most, at {worst.name} (certified)")
    if report.loading:
        lines.append(report.loading)
    return lines + [f"Warning: {warning}" for warning in report.warnings]


def size_table(report: Report) -> list[str]:
    """Return the lines of a table of what the model was and is."""
    lines = ["| | dense | pruned | pruned / dense |", "|---|---|---|---|"]
    for title, before, after in _sizes(report):
        lines.append(f"| {title} | {before:,} | {after:,} | {after / before:.3f} |")
    if report.latency and report.latency["measured"] is not None:
        lines.append(
            f"| time of {report.latency['table']['phase']}, as measured before saving | | "
            f"| {report.latency['measured']['median']:.3f} |"
        )
    dense, pruned = report.evaluation.get("dense"), report.evaluation.get("pruned")
    if dense and pruned:
        ratio = pruned["perplexity"] / dense["perplexity"]
        lines.append(
            f"| perplexity, {dense['tokens']:,} tokens in windows of {dense['seq_len']} "
            f"| {dense['perplexity']:.2f} | {pruned['perplexity']:.2f} | {ratio:.3f} |"
        )
    certified = report.evaluation.get("certified")
    if certified:
        lines.append(
            f"| divergence from the dense model, {certified['rows']:,} outputs no decision has "
            f"seen: KL in nats, or without logits half the squared relative distance | 0 "
            f"| {figure(certified['divergence'])} | |"
        )
    return lines


def site_table(rows: Sequence[SiteRow]) -> list[str]:
    """Return the lines of a table of sites, or of places where hidden features are read."""
    certified = any(row.certified_error is not None for row in rows)
    lines = [
        "Errors are relative to the energy of the dense output. *Cross-validated*: solved on one "
        "half of the calibration documents and measured on the other; the regularisation is chosen "
        "by it, and importance scores have seen both halves."
        + (" *Certified*: measured on text that no decision has seen." if certified else ""),
        "",
        "| site | units | parameters | damp | error | cross-validated "
        f"{'| certified ' if certified else ''}| condition | dropped rows | path | target | s |",
        "|---" * (12 if certified else 11) + "|",
    ]
    return lines + [
        f"| {row.name} | {row.units_before} → {row.units_after} "
        f"| {row.params_before:,} → {row.params_after:,} | {row.damp:.0e} "
        f"| {figure(row.error)} | {figure(row.holdout_error)} "
        f"{f'| {figure(row.certified_error)} ' if certified else ''}| {row.condition:.0e} "
        f"| {row.dropped_rows} | {row.path} | {_target(row)} | {row.seconds:.1f} |"
        for row in rows
    ]


def latency(found: Mapping) -> list[str]:
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
    if measured is not None:
        low, high = 1 / measured["high"], 1 / measured["low"]
        fast += f", ×{1 / measured['median']:.3f} measured ({low:.3f}–{high:.3f})"
    outside = table["fixed"] / found["dense_seconds"]
    return [
        f"{fast} ({what}, {asked}; the table is of {place})",
        f"{1000 * found['dense_seconds']:.4g} ms dense, of which {outside:.1%} lie outside of what "
        "can be pruned",
    ]


def latency_table(table: Mapping) -> list[str]:
    """Return the lines of a table of milliseconds by units kept."""
    lines = [
        "| sites | units kept: milliseconds of one site (half of the distance between quartiles) |",
        "|---|---|",
    ]
    for row in table["rows"]:
        some = zip(row["counts"], row["seconds"], row["spread"], strict=True)
        sizes = [f"{n}: {1000 * s:.3g} (±{1000 * spread:.1g})" for n, s, spread in some]
        unit = row["unit"].replace("_", " ")
        lines.append(f"| {row['sites']} {row['kind']}, {unit}s | {', '.join(sizes)} |")
    scale = table["scale"]
    return [*lines, "", f"A whole plan saved {scale:.3f} times what its sites add up to."]


def grid_table(grid: Mapping) -> list[str]:
    """Return the lines of a table of the steps that sizes are counted in, and what they cost."""
    lines = ["| | dense | in steps of | kept |", "|---|---|---|---|"]
    for row in grid.get("sites", ()):
        least, most = row["least_kept"], row["most_kept"]
        kept = str(most) if least == most else f"{least} to {most}"
        title = f"{row['layers']} {row['kind']} layers, {row['unit'].replace('_', ' ')}s"
        lines.append(f"| {title} | {row['units']} | {row['step']} | {kept} |")
    hidden = grid.get("hidden")
    if hidden:
        lines.append(
            f"| hidden features | {hidden['units']} | {hidden['step']} | {hidden['kept']} |"
        )
    lines += ["", f"Tile {grid['tile']}."]
    if hidden:
        lines[-1] += f" With tile 1 {hidden['kept_at_tile_1']} hidden features would stay."
    if grid.get("sites"):
        lines += [
            f"Kept of the budget's cost: {grid['kept']:.4f} on the grid, "
            f"{grid['kept_at_tile_1']:.4f} with tile 1.",
            f"What the allocation minimises: {grid['objective']}"
            + (f"; {_cost(grid)}" if "predicted_divergence" in grid else "")
            + ".",
        ]
    return lines + ["", *(f"- {note}" for note in grid.get("notes", ()))]


def _cost(grid: Mapping) -> str:
    on_grid, single = grid["predicted_divergence"], grid["predicted_divergence_at_tile_1"]
    return f"{figure(on_grid)} on the grid, {figure(single)} with tile 1"


def _steps(grid: Mapping) -> list[str]:
    """Return a line on the steps of sizes and what they cost, where they are more than a unit."""
    rows = [row for row in grid.get("sites", ()) if row["unit"] == "channel"]
    steps = sorted({row["step"] for row in rows if row["step"] > 1})
    said = [f"MLP channels in steps of {', '.join(map(str, steps))}"] if steps else []
    if grid.get("hidden"):
        hidden = grid["hidden"]
        kept = f"{hidden['kept']} stay, with tile 1 {hidden['kept_at_tile_1']}"
        said.append(f"hidden features in steps of {hidden['step']}: {kept}")
    if said and "predicted_divergence" in grid:
        said.append(f"predicted divergence {_cost(grid)}")
    elif said and "kept" in grid:
        said.append(f"kept {grid['kept']:.4f}, with tile 1 {grid['kept_at_tile_1']:.4f}")
    return ["; ".join(said)] if said else []


def fact_table(facts: Mapping[str, object]) -> list[str]:
    """Return the lines of a table of names and values."""
    return ["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in facts.items())]


def figure(value: object) -> str:
    """Return a value as a person reads it: a number to three digits."""
    if not isinstance(value, float):
        return "" if value is None else str(value)
    return f"{value:.3g}"


def _sizes(report: Report) -> list[tuple[str, int, int]]:
    """Return title, before and after of whatever was counted."""
    titles = {"parameters": ("before", "after")}
    titles["prunable parameters"] = ("prunable_before", "prunable_after")
    params = report.params
    return [
        (title, params[before], params[after])
        for title, (before, after) in titles.items()
        if params.get(before)
    ]


def _earlier(report: Report) -> list[str]:
    """Return a line on each job that had pruned the model before."""
    lines = []
    for job in report.earlier:
        before, after = job.get("params", (0, 0))
        keep = job.get("budget", {}).get("keep")
        lines.append(f"Pruned before: {before:,} → {after:,} parameters (keep {keep})")
    return lines


def _target(row: SiteRow) -> str:
    return f"{row.share:.2f} {row.target}" if row.share else "dense-input"
