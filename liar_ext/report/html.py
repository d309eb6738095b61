"""The page of one job: what it did, what that cost in quality, and what it took."""

from __future__ import annotations

import math
import os
from pathlib import Path

from liar_ext.benchmarking.stored import Benchmark, bench_file, read_bench, table
from liar_ext.errors import InputError
from liar_ext.report import canvas, page, pictures
from liar_ext.report.reading import Perplexity, SavedReport, SavedSite, read_report
from liar_ext.whole_file import begins_with, check_place, write_whole

MOST_ROWS = 512  # of a table of sites
MEASURE_SPEED = "liar bench DIR --against MODEL measures it."
MEASURE_PERPLEXITY = "liar prune --eval TEXT measures it, for causal language models."


def page_file(folder: str | os.PathLike[str]) -> Path:
    """Return where the page of a folder goes: beside it, for the folder itself is sealed."""
    path = Path(folder).resolve()
    return path.with_name(f"{path.name}.html")


def write_page(
    folder: str | os.PathLike[str],
    file: str | os.PathLike[str] | None = None,
    png: str | os.PathLike[str] | None = None,
) -> list[Path]:
    """Write the page of a saved folder, and its pictures as PNG; return the files.

    Parameters
    ----------
    folder : path
        What :func:`liar_ext.save_pruned` wrote, with a report.
    file : path, optional
        Where the page goes; ``DIR.html`` beside the folder by default.
    png : path, optional
        A folder for the pictures.

    Raises
    ------
    InputError
        If there is no report that can be read, matplotlib is missing, or nothing can be written.
    """
    target = page_file(folder) if file is None else Path(file)
    check_place(target, "report", "-o", begins_with(page.MARK))
    report = read_report(folder)
    bench, notes = stored_bench(folder, report)
    with canvas.drawing("report") as figures:
        drawn = {
            "units": pictures.kept(report, figures),
            "errors": pictures.errors(report, figures),
            "seconds": pictures.time_spent(report, figures),
        }
        svgs = {name: figure and canvas.to_svg(figure, name) for name, figure in drawn.items()}
        write_whole(target, render(report, svgs, bench, notes), "report", "-o")
        there = {name: figure for name, figure in drawn.items() if figure is not None}
        written = [] if png is None else canvas.write_pictures(Path(png), there, "report")
    return [target, *written]


def stored_bench(
    folder: str | os.PathLike[str], report: SavedReport
) -> tuple[Benchmark | None, list[str]]:
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
    if bench.report_digest != report.digest:
        return None, [
            f"The stored benchmark {path.name} is of another state of this folder and is left out; "
            "run liar bench again."
        ]
    return bench, []


def render(
    report: SavedReport,
    svgs: dict[str, str | None],
    bench: Benchmark | None = None,
    notes: list[str] | None = None,
) -> str:
    """Return the page as HTML.

    Parameters
    ----------
    report : SavedReport
        What it tells.
    svgs : dict
        The pictures ``units``, ``errors`` and ``seconds``; None where there is nothing to draw.
    bench : Benchmark, optional
        Speed and memory.
    notes : list of str, optional
        What a reader has to know besides.
    """
    model = report.model or "an unnamed model"
    said = [*(notes or []), *report.notes, *report.warnings]
    return page.document(
        f"{report.folder}: pruned from {model}",
        [
            f"<h1>{page.escape(report.folder)}</h1><p>Pruned from <b>{page.escape(model)}</b>"
            f"{page.escape(_choices(report))}.</p>",
            f'<div class="tiles">{"".join(_tiles(report, bench))}</div>',
            *(page.warning(each) for each in said),
            f'<div class="pictures">{"".join(_pictures(report, svgs))}</div>',
            _speed(bench),
            page.section("Loading", f"<p>{page.with_code(report.loading)}</p>")
            if report.loading
            else "",
            *_tables(report),
            page.footer("report"),
        ],
    )


def change(before: float, after: float) -> str:
    """Return the ratio of two numbers as text."""
    return f"×\u00a0{after / before:.3f}" if before else ""


def magnitude(value: float) -> str:
    """Return a count in millions or billions, as models are named by."""
    for unit, word in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:.4g}\u00a0{word}"
    return f"{value:,}"


def quality(value: float) -> str:
    """Return a perplexity as text."""
    return f"{value:.2f}" if value < 1e4 else f"{value:.3g}"


def _choices(report: SavedReport) -> str:
    """Return the choices that matter most, as the end of a sentence."""
    known = {key: value for table in report.facts.values() for key, value in table.items()}
    said = []
    if "keep" in known:
        said.append(f"{known['keep']} of {known.get('of', 'its parameters')} kept")
    words = ("criterion", "allocation", "schedule")
    said += [f"{word} {known[word]}" for word in words if word in known]
    return f" ({', '.join(said)})" if said else ""


def _tiles(report: SavedReport, bench: Benchmark | None) -> list[str]:
    tiles = []
    for title, first, last in (
        ("parameters", "before", "after"),
        ("prunable parameters", "prunable_before", "prunable_after"),
    ):
        before, after = report.params.get(first), report.params.get(last)
        if before and after is not None:
            shown = f"{after / before:.1%}"
            under = f"{magnitude(before)} → {magnitude(after)}"
            tiles.append(page.tile(title, shown, under, after / before))
        else:
            tiles.append(page.tile(title, "–", "not measured"))
    dense, pruned = report.dense, report.pruned
    if dense and pruned:
        under = f"{quality(dense.value)} → {quality(pruned.value)}"
        tiles.append(page.tile("perplexity", change(dense.value, pruned.value), under))
    elif report.divergence is None:
        tiles.append(page.tile("perplexity", "–", "not measured"))
    if report.divergence is not None:
        value, rows = report.divergence
        under = "from the dense model, certified" + (f", {rows:,} outputs" if rows else "")
        tiles.append(page.tile("divergence", f"{value:.3g}", under))
    for what, title in (("decode", "greedy decoding"), ("encode", "encoding")):
        rate = bench.rate(what) if bench else None
        if rate is not None and rate.ratio is not None:
            under = f"pruned / dense, batch {rate.batch}"
            tiles.append(page.tile(f"speed, {title}", f"× {rate.ratio.median:.2f}", under))
    if report.total is not None:
        tiles.append(page.tile("time spent", _duration(report.total), "for the whole job"))
    return tiles


def _pictures(report: SavedReport, svgs: dict[str, str | None]) -> list[str]:
    rows = "The report names no site with its units."
    return [
        page.picture(
            "Units kept per layer",
            svgs.get("units"),
            "Heads, or groups of heads that share keys, and MLP channels: of each layer what was "
            "there and what stays.",
            rows,
        ),
        page.picture(
            "Error per layer",
            svgs.get("errors"),
            "Of a pruned layer's output, relative to its energy before. Held out: solved on one "
            "half of the calibration documents, measured on the other"
            + ("; certified: on text that no decision has seen." if _certified(report) else "."),
            "No site of the report was pruned and has an error.",
        ),
        _perplexities(report),
        page.picture(
            "Time spent",
            svgs.get("seconds"),
            "Seconds by stage of the job.",
            "The report has no seconds.",
        ),
    ]


def _certified(report: SavedReport) -> bool:
    return any(site.certified_error is not None for site in report.sites)


def _perplexities(report: SavedReport) -> str:
    dense, pruned = report.dense, report.pruned
    if not (dense and pruned):
        return page.picture("Perplexity", None, "", MEASURE_PERPLEXITY)
    rows = [
        ("dense", quality(dense.value), ""),
        ("pruned", quality(pruned.value), change(dense.value, pruned.value)),
    ]
    on = _measured_on(pruned)
    note = f'<p class="note">{page.escape(on)}</p>' if on else ""
    shown = page.table(("", "perplexity", "pruned / dense"), rows)
    return f"<figure>{page.section('Perplexity', shown, note)}</figure>"


def _measured_on(found: Perplexity) -> str:
    tokens = "" if found.tokens is None else f"Over {found.tokens:,} tokens"
    return tokens + (f", windows of {found.seq_len:,}." if tokens and found.seq_len else "")


def _speed(bench: Benchmark | None) -> str:
    if bench is None:
        return page.section("Speed and memory", missing=MEASURE_SPEED)
    said = [f"{key} {value}" for key, value in (bench.settings | bench.machine).items()]
    against = "" if bench.dense is None else f"Dense: {bench.dense.name}. "
    note = f"{against}Medians of alternating rounds; ratios with their quartiles. "
    return page.section(
        "Speed and memory",
        page.table(("", "dense", "pruned", "pruned / dense"), table(bench)),
        f'<p class="note">{page.escape(note + "; ".join(said))}</p>',
    )


def _tables(report: SavedReport) -> list[str]:
    parts = []
    for title, sites in (("Sites", report.sites), ("Hidden features", report.hidden)):
        if sites:
            inner = page.table(
                ("site", "units", "parameters", "error", "held out", "certified", "λ", "s"),
                [_row(site) for site in sites[:MOST_ROWS]],
            )
            if len(sites) > MOST_ROWS:
                more = f"And {len(sites) - MOST_ROWS:,} more, which report.json has."
                inner += f'<p class="note">{more}</p>'
            parts.append(page.folded(f"{title} ({len(sites):,})", inner))
    parts += [page.folded(title, page.facts(rows)) for title, rows in report.facts.items()]
    return parts


def _row(site: SavedSite) -> list[str]:
    damp = "drop" if site.damp == math.inf else _short(site.damp)
    return [
        site.name,
        _pair(site.units_before, site.units_after),
        _pair(site.params_before, site.params_after),
        _short(site.error),
        _short(site.holdout_error),
        _short(site.certified_error),
        damp,
        "–" if site.seconds is None else f"{site.seconds:.1f}",
    ]


def _pair(before: int | None, after: int | None) -> str:
    if before is None or after is None:
        return "–"
    return f"{before:,} → {after:,}" if after != before else f"{before:,}"


def _short(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
