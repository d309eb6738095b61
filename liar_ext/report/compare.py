"""The page of several jobs: perplexity and speed against parameters."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from liar_ext.benchmarking.stored import Benchmark, Rate, figure
from liar_ext.errors import InputError
from liar_ext.report import canvas, page
from liar_ext.report.html import change, magnitude, quality, stored_bench
from liar_ext.report.reading import SavedReport, read_report
from liar_ext.report.scatter import Point, scatter
from liar_ext.untrusted import text
from liar_ext.whole_file import begins_with, check_place, write_whole

MOST_RUNS = 50
MOST_DRIFT = 1.1  # of a dense model's speed between measurements
# What two measurements must share to be compared.
CONDITIONS = ("dtype", "device", "threads", "prompt_length", "new_tokens", "cpu")
SPEEDS = {"decode": "greedy tokens/s", "encode": "inputs/s"}


@dataclass(frozen=True)
class Run:
    """A job of a comparison: its number on the page, the name of its folder, and what it has."""

    number: int
    name: str
    report: SavedReport
    bench: Benchmark | None


def write_comparison(
    folders: Sequence[str | os.PathLike[str]],
    file: str | os.PathLike[str],
    png: str | os.PathLike[str] | None = None,
    benches: Mapping[str, Benchmark] | None = None,
) -> list[Path]:
    """Write one page of several saved folders, and its pictures as PNG; return the files.

    Parameters
    ----------
    folders : sequence of path
        What :func:`liar_ext.save_pruned` wrote, with reports.
    file : path
        Where the page goes.
    png : path, optional
        A folder for the pictures.
    benches : mapping of str to Benchmark, optional
        By folder as given, instead of what is stored beside it.

    Raises
    ------
    InputError
        If there are too many, one has no report, or nothing can be written.
    """
    check(folders, file)
    target = Path(file)
    runs, notes = read_runs(folders, benches)
    what = speed_of(runs)
    with canvas.drawing("compare") as figures:
        drawn = {
            "perplexity": scatter(
                figures, perplexity_points(runs), "perplexity", lower_is_better=True
            ),
            "speed": scatter(figures, speed_points(runs, what), SPEEDS[what[0]]),
        }
        svgs = {name: each and canvas.to_svg(each, name) for name, each in drawn.items()}
        write_whole(target, render(runs, svgs, notes), "compare", "-o")
        there = {name: each for name, each in drawn.items() if each is not None}
        written = [] if png is None else canvas.write_pictures(Path(png), there, "compare")
    return [target, *written]


def check(folders: Sequence[str | os.PathLike[str]], file: str | os.PathLike[str]) -> None:
    """Raise InputError if there are too many folders, or the page can't be written."""
    if len(folders) > MOST_RUNS:
        raise InputError(
            f"compare: takes at most {MOST_RUNS} folders, got {len(folders)}; compare fewer"
        )
    check_place(Path(file), "compare", "-o", begins_with(page.MARK))


def read_runs(
    folders: Sequence[str | os.PathLike[str]], benches: Mapping[str, Benchmark] | None = None
) -> tuple[list[Run], list[str]]:
    """Return what is stored of each folder, and what a reader has to know of it."""
    runs, notes = [], []
    for number, folder in enumerate(folders, 1):
        report = read_report(folder, "compare")
        bench, said = (benches or {}).get(os.fspath(folder)), []
        if bench is None:
            bench, said = stored_bench(folder, report)
        runs.append(Run(number, report.folder, report, bench))
        notes += [f"{report.folder}: {each}" for each in said]
    names = [run.name for run in runs]
    if len(set(names)) < len(names):  # folders of one name: told apart by their paths
        paths = [text(os.fspath(folder), 100) for folder in folders]
        runs = [Run(r.number, path, r.report, r.bench) for r, path in zip(runs, paths, strict=True)]
    return runs, notes + cautions(runs)


def cautions(runs: Sequence[Run]) -> list[str]:
    """Return why numbers of these runs don't compare, where they don't."""
    said = []
    models = sorted({run.report.model or "an unnamed model" for run in runs})
    if len(models) > 1:
        shown = ", ".join(models[:5]) + (" …" if len(models) > 5 else "")
        said.append(
            f"These are runs of {len(models)} different models: {shown}. Perplexities of models "
            "with other tokenizers don't compare."
        )
    measured = [run for run in runs if run.report.pruned is not None]
    windows = {(run.report.pruned.tokens, run.report.pruned.seq_len) for run in measured}
    texts = {_known(run.report, "eval") for run in measured}
    if len(windows) > 1 or len(texts) > 1:
        said.append(
            "Perplexities were measured on different text or windows of different length, and "
            "don't compare."
        )
    without = [run.name for run in runs if run.report.pruned is None]
    if without:
        said.append(f"No perplexity was measured for {_some(without)}.")
    benches = [run.bench for run in runs if run.bench is not None]
    for name in CONDITIONS:
        values = sorted({text((b.settings | b.machine).get(name, "?")) for b in benches})
        if len(values) > 1:
            said.append(
                f"Speeds were measured with different {name} ({_some(values)}), and don't compare."
            )
    return said + _drift(runs)


def _drift(runs: Sequence[Run]) -> list[str]:
    """Return that a dense model was not as fast in one measurement as in another, if so."""
    what, found = speed_of(runs), {}
    for run in runs:
        rate = _rate(run, what)
        if rate and rate.dense and rate.dense.median > 0:
            found.setdefault((run.report.model, run.bench.dense.params), []).append(
                rate.dense.median
            )
    worst = max((max(each) / min(each) for each in found.values()), default=1.0)
    if worst < MOST_DRIFT:
        return []
    return [
        f"The dense model itself was {worst:.2f} times as fast in one measurement as in another: "
        "compare the ratios to it, which were measured in turns, and not tokens/s."
    ]


def speed_of(runs: Sequence[Run]) -> tuple[str, int | None]:
    """Return the speed, and the batch size, that most runs have."""
    found: dict[tuple[str, int | None], int] = {}
    for run in runs:
        for rate in run.bench.rates if run.bench else []:
            if rate.what in SPEEDS:
                key = rate.what, rate.batch
                found[key] = found.get(key, 0) + 1
    return max(found, key=lambda key: (found[key], -(key[1] or 0)), default=("decode", None))


def perplexity_points(runs: Sequence[Run]) -> list[Point]:
    """Return the perplexities, those of the dense models once each."""
    points = []
    for run in runs:
        report = run.report
        if report.pruned and report.params.get("after"):
            value = report.pruned.value
            points.append(Point(report.params["after"], value, report.model, run.number))
        if report.dense and report.params.get("before"):
            points.append(Point(report.params["before"], report.dense.value, report.model))
    return list(dict.fromkeys(points))


def speed_points(runs: Sequence[Run], what: tuple[str, int | None]) -> list[Point]:
    """Return the rates of one kind and batch size, those of the dense models, too."""
    points = []
    for run in runs:
        rate = _rate(run, what)
        params = run.bench.pruned.params if rate else None
        params = params or run.report.params.get("after")
        if rate is None or not params:
            continue
        model = run.report.model
        points.append(Point(params, rate.pruned.median, model, run.number))
        if rate.dense and run.bench.dense.params:
            points.append(Point(run.bench.dense.params, rate.dense.median, model))
    return points


def render(runs: Sequence[Run], svgs: Mapping[str, str | None], notes: Sequence[str]) -> str:
    """Return the page as HTML; ``svgs`` has ``perplexity`` and ``speed``, or None for either."""
    what = speed_of(runs)
    batch = "" if what[1] is None else f", batch {what[1]}"
    shown = [
        page.picture(
            "Perplexity against parameters",
            svgs.get("perplexity"),
            "Lower is better. Filled: pruned, with its number in the table; hollow: dense.",
            "Run liar prune with --eval TEXT.",
        ),
        page.picture(
            "Speed against parameters",
            svgs.get("speed"),
            f"Median {SPEEDS[what[0]]}{batch}; higher is better. Hollow: the dense model, in the "
            "same rounds.",
            "Run liar bench DIR --against MODEL, or compare with --measure.",
        ),
    ]
    heads = ["", "run", "parameters", "perplexity", f"{SPEEDS[what[0]]}{batch}", "model"]
    return page.document(
        f"Comparison of {len(runs)} pruned models",
        [
            f"<h1>Comparison of {len(runs)} pruned model{'s' if len(runs) != 1 else ''}</h1>",
            *(page.warning(note) for note in notes),
            f'<div class="pictures">{"".join(shown)}</div>',
            page.section("Runs", page.table(heads, [_row(run, what) for run in runs], (1, 5))),
            page.footer("compare", "In brackets: pruned / dense."),
        ],
    )


def _row(run: Run, what: tuple[str, int | None]) -> list[Any]:
    report, rate = run.report, _rate(run, what)
    before, after = report.params.get("before"), report.params.get("after")
    dense, pruned = report.dense, report.pruned
    share = f" ({after / before:.1%})" if before and after is not None else ""
    ratio = f" ({change(dense.value, pruned.value)})" if dense and pruned else ""
    gain = f" (×\u00a0{rate.ratio.median:.3f})" if rate and rate.ratio else ""
    return [
        run.number,
        run.name,
        "–" if after is None else magnitude(after) + share,
        quality(pruned.value) + ratio if pruned else "–",
        figure(rate.pruned.median) + gain if rate else "–",
        report.model or "–",
    ]


def _rate(run: Run, what: tuple[str, int | None]) -> Rate | None:
    return None if run.bench is None else run.bench.rate(*what)


def _known(report: SavedReport, name: str) -> str:
    return next((table[name] for table in report.facts.values() if name in table), "")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
