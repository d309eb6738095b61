"""The tables of a report, a function for each, and what some of them say in sentences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from liar_ext.measure.speed import Benchmark
from liar_ext.reconstruction.solve import SiteRow
from liar_ext.report import tables
from liar_ext.report.tables import Table, arrow, figure, pair, quality, rate, ratio
from liar_ext.system.files import mapping, number, text

MIB = 2**20
SIZES = {"parameters": "", "prunable parameters": "prunable_"}  # title, and what keys begin with
RATIO = ("", "dense", "pruned", "pruned / dense")
ERRORS = (
    "Errors are relative to the energy of the dense output. Held out: solved on one half of the "
    "calibration documents and measured on the other; the regularisation is chosen by it, and "
    "importance scores have seen both halves."
)
WAYS = {"one-pass": "in one pass", "layerwise": "layer by layer"}
APART = "Errors, perplexity and divergence elsewhere in this report were measured before healing."
# Of a vocabulary on held-out text: with both tokenizers, and compared with all tokens.
PAIRS = ("tokens_per_byte", "bits_per_byte")
LIKENESS = ("cosine", "neighbours", "divergence", "agreement", "correlation")


def facts(title: str, found: Mapping[str, Any], note: str = "") -> Table:
    """Return names and values."""
    return Table(title, ("", ""), [(k, text(v)) for k, v in found.items()], (0, 1), note)


def sizes(params: Mapping, evaluation: Mapping, latency: Mapping, dtype: str = "") -> Table:
    """Return what the model was and is: parameters, time, measures, divergence."""
    rows = []
    for title, part in SIZES.items():
        before, after = params.get(f"{part}before"), params.get(f"{part}after")
        if before and after is not None:
            rows.append((title, f"{before:,}", f"{after:,}", ratio(before, after)))
            if dtype in tables.BYTES and not part:
                weights = (tables.megabytes(count, dtype) for count in (before, after))
                rows.append((f"weights, {dtype}", *weights, ratio(before, after)))
    if latency and latency["measured"]:
        title = f"time of {timed(latency['table'])}, as measured before saving"
        rows.append((title, "", "", f"{latency['measured']['median']:.3f}"))
    for name, before, after in tables.measures(evaluation):
        title = f"{tables.MEASURES[name]}, {tables.measured_on(evaluation['dense'])}"
        rows.append((title, quality(before), quality(after), ratio(before, after)))
    certified = evaluation.get("certified")
    if certified:
        title = (
            f"divergence from the dense model, {figure(certified.get('rows'), ',')} outputs no "
            "decision has seen: KL in nats, half the squared difference of scores, or without "
            "logits half the squared relative distance"
        )
        rows.append((title, "0", figure(certified["divergence"]), ""))
    return Table("Sizes and quality", RATIO, rows)


LAYERWISE = (
    " Layer by layer they count what the layers before have lost, on text that those were solved "
    "for: fresh text can show several times as much. Judge the model by --eval, --certify or its "
    "own task."
)


def sites(title: str, rows: Sequence[SiteRow]) -> Table:
    """Return a row for each site, or each place where hidden features are read."""
    has_certified = any(row.certified_error is not None for row in rows)
    cells = [
        (
            row.name,
            pair(row.units_before, row.units_after),
            pair(row.params_before, row.params_after),
            "drop" if row.damp == math.inf else figure(row.damp, ".0e"),
            figure(row.error),
            figure(row.holdout_error),
            *[figure(row.certified_error)] * has_certified,
            figure(row.condition, ".0e"),
            figure(row.dropped_rows, ","),
            row.path,
            f"{row.share:.2f} {row.target}" if row.share else "dense-input",
            figure(row.seconds, ".1f"),
        )
        for row in rows
    ]
    heads = ["site", "units", "parameters", "damp", "error", "held out"]
    heads += ["certified"] * has_certified
    heads += ["condition", "dropped rows", "path", "target", "s"]
    said = ERRORS + has_certified * " Certified: measured on text that no decision has seen."
    if any(row.target != "dense-input" for row in rows):
        said += LAYERWISE
    return Table(title, heads, cells, (0, len(heads) - 3, len(heads) - 2), said)


def timed(table: Mapping[str, Any]) -> str:
    """Return what a table of latency has the seconds of, in words."""
    phase = table["phase"] if table["phase"] != "both" else "prefill and decode"
    return table["where"].get("timed", phase)


def latency_lines(found: Mapping[str, Any]) -> list[str]:
    """Return lines on how much faster a plan is, for a budget of latency."""
    if not found:
        return []
    table, measured = found["table"], found["measured"]
    what = timed(table)
    asked = f"batch {table['batch']}, prompt of {table['prompt']} tokens"
    if "decode" in what:
        asked += f", {table['new_tokens']} new ones"
    where = {"device": "?", "dtype": "?", "threads": "?"} | table["where"]
    place = "{device}, {dtype}, {threads} threads".format(**where)
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
        price = f"; {_price(found)}" if "predicted_divergence" in found else ""
        notes.append(f"Kept of the budget's cost: {kept}.")
        notes.append(f"What the allocation minimises: {found['objective']}{price}.")
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
        said.append(f"predicted divergence {_price(found)}")
    elif said and "kept" in found:
        said.append(f"kept {found['kept']:.4f}, with tile 1 {found['kept_at_tile_1']:.4f}")
    return ["; ".join(said)] if said else []


def _price(found: Mapping[str, Any]) -> str:
    on_grid, single = found["predicted_divergence"], found["predicted_divergence_at_tile_1"]
    return f"{figure(on_grid)} on the grid, {figure(single)} with tile 1"


def schedule_lines(settings: Mapping[str, Any]) -> list[str]:
    """Return how layers were solved, if held-out text decided it."""
    found, chosen = settings.get("schedules"), WAYS.get(text(settings.get("schedule")))
    known = [name for name in WAYS if number(mapping(found).get(name)) is not None]
    if chosen is None or not known:
        return []
    values = ", ".join(f"{found[name]:.3g} {WAYS[name]}" for name in known)
    return [f"{chosen}; divergence on held-out text: {values}"]


def earlier_job(job: Mapping[str, Any]) -> str:
    """Return what a job did that had pruned the model before."""
    keep = job.get("budget", {}).get("keep")
    return f"{pair(*job.get('params', (None, None)))} parameters (keep {text(keep)})"


def speed(bench: Benchmark) -> Table:
    """Return what was timed, of both models and as their ratio, and what they take of memory."""
    rows = []
    for each in bench.rates:
        what, found = f"batch {each.batch}: {each.what}, {each.unit}", each.ratio
        share = f"{found.median:.3f} ({found.low:.3f}–{found.high:.3f})"
        rows.append((what, rate(each.dense.median), rate(each.pruned.median), share))
    dense, pruned = bench.dense, bench.pruned
    counts = [("parameters", dense.params, pruned.params, 1)]
    counts.append(("weights, MiB", dense.weight_bytes, pruned.weight_bytes, MIB))
    for stage, peak in pruned.peak.items():
        what = {"load": "after loading", "device": "of the device"}.get(stage, f"batch {stage}")
        counts.append((f"peak memory, {what}, MiB", dense.peak.get(stage), peak, MIB))
    for what, before, after, unit in counts:
        if after is not None:
            left = "" if before is None else f"{before / unit:,.0f}"
            rows.append((what, left, f"{after / unit:,.0f}", ratio(before, after)))
    settings = bench.settings | bench.machine
    said = "; ".join(f"{key} {text(value)}" for key, value in settings.items())
    note = f"Dense: {dense.name}. "
    note += f"Medians of alternating rounds, ratios with their quartiles; {said}"
    heads = (*RATIO[:3], "pruned / dense (quartiles)")
    return Table("Speed and memory", heads, rows, (0,), note)


HEALED_BEFORE = "Healed before: "


def healing_lines(found: Mapping[str, Any]) -> list[str]:
    """Return what healing did; nothing if the model was not healed."""
    if not found:
        return []
    early = " (interrupted)" if found.get("interrupted") is True else ""
    said = (
        f"Trained towards the dense model for {figure(found['tokens'], ',')} tokens and "
        f"{figure(found['seconds'], '.0f')} s{early}"
    )
    if found["improved"]:
        said += f": held-out loss {arrow('.4g', found['before'], found['after'])}."
    else:
        said += (
            ", without gain: the held-out loss never fell below "
            f"{figure(found['before'], '.4g')}, so the weights are those before healing."
        )
    if found.get("diverged") is True:
        said += " Training broke off, as gradients were not finite: give a lower --lr."
    notes, lines = found.get("notes", ()), [said]
    start = "before" if any(note.startswith(HEALED_BEFORE) for note in notes) else "pruned"
    for name, row in (found.get("quality") or {}).items():
        dense, before, after = map(quality, row)
        lines.append(f"{name.capitalize()}: dense {dense}, {start} {before}, healed {after}.")
    return [*lines, *notes]


def healing(found: Mapping[str, Any]) -> Table:
    """Return the curve of the held-out loss and the settings."""
    rows = [
        (f"held-out loss after {figure(tokens, ',')} tokens", figure(loss, ".4g"))
        for tokens, loss in found["curve"]
    ]
    apart = ("before", "after", "improved", "interrupted", "diverged", "curve", "quality", "notes")
    rows += [(key.replace("_", " "), text(each)) for key, each in found.items() if key not in apart]
    return Table("Healing", ("", ""), rows, (0, 1), " ".join([*healing_lines(found), APART]))


def vocabulary_lines(found: Mapping[str, Any]) -> list[str]:
    """Return which tokens stay and what that changes; nothing if all do."""
    if not found:
        return []
    texts = ", ".join(found.get("text", ())) or "the calibration text"
    if found["after"] == found["before"]:
        return [f"All {found['before']:,} tokens stay: with fewer of them more would be lost."]
    said = [
        f"{found['after']:,} of {found['before']:,} tokens stay ({found['kind'] or 'tokenizer'}), "
        f"chosen by their counts in {texts}."
    ]
    if found.get("alike_lines") is not None:
        said.append(
            "Both tokenizers read its lines without a removed token alike: "
            f"{found['alike_lines']:,}."
        )
    if "bits_per_byte" in found.get("held_out", {}):
        before, after = _both(found["held_out"]["bits_per_byte"])
        said.append(f"Bits per byte of held-out text: {before} before, {after} after.")
    return said


def vocabulary(found: Mapping[str, Any]) -> Table:
    """Return what a smaller vocabulary changes."""
    held_out = found.get("held_out", {})
    pruned = held_out.get("pruned", {})
    rows = [
        ("tokens", f"{found['before']:,}", f"{found['after']:,}", ""),
        ("tokens per byte, text that chose", *_both(found.get("tokens_per_byte")), ""),
    ]
    for name in PAIRS:
        if name in held_out:
            last = _both(pruned.get(name))[1] if name == "bits_per_byte" and pruned else ""
            rows.append((f"{name.replace('_', ' ')}, held out", *_both(held_out[name]), last))
    for name in LIKENESS:
        if name in held_out:
            both = (figure(each.get(name), ".4g") for each in (held_out, pruned))
            rows.append((f"{name}, held out", "", *both))
    heads = ("", "all tokens", "fewer tokens", "pruned")
    return Table("Vocabulary", heads, rows, (0,), " ".join(vocabulary_lines(found)))


def vocabulary_sizes(found: Mapping[str, Any]) -> Table:
    """Return the sizes that ``--keep-vocab auto`` has tried."""
    name, most = found["judged_by"].replace("_", " "), found["most_loss"]
    heads = {"tokens": ",", "loss": ".2%", "tokens per byte": ".4g"}
    if most is None:
        heads["kept by heads and channels alone"] = ".1%"
    rows = [tuple(map(figure, step, heads.values())) for step in found["curve"]]
    note = f"Loss of {name} on documents that chose no token. " + (
        "Heads and channels were pruned to the rest of the budget, in one pass. The best was taken."
        if most is None
        else f"The smallest size was taken that loses at most {most:.1%}."
    )
    return Table("Sizes of the vocabulary", tuple(heads), rows, (), note)


def _both(pair: Sequence[float | None] | None) -> list[str]:
    return [figure(each, ".4g") for each in pair or (None, None)]
