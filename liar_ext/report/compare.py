"""The page of several jobs: quality and speed against parameters."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from liar_ext.atomic_write import begins_with, check_place, write_whole
from liar_ext.errors import InputError
from liar_ext.measure.timing import Benchmark, Rate
from liar_ext.report import page, pictures, tables
from liar_ext.report.page import name_of, stored_bench
from liar_ext.report.pictures import Point, scatter
from liar_ext.report.report import Report
from liar_ext.report.tables import Table, render
from liar_ext.untrusted import text

MOST_RUNS = 50
MOST_DRIFT = 1.1  # of a dense model's speed between measurements
# What two measurements must share to be compared.
CONDITIONS = ("dtype", "device", "threads", "prompt_length", "new_tokens", "cpu")
SPEEDS = {"decode": "greedy tokens/s", "encode": "inputs/s"}
What = tuple[str, int | None]  # a speed, and a batch size


@dataclass(frozen=True)
class Run:
    """A job of a comparison: its number on the page, the name of its folder, and what it has."""

    number: int
    name: str
    report: Report
    bench: Benchmark | None

    def rate(self, what: What) -> Rate | None:
        """Return the rate of one kind and batch size."""
        return None if self.bench is None else self.bench.rate(*what)

    def quality(self, of: str, measure: str) -> float | None:
        """Return a measure of the model, ``dense`` or ``pruned``."""
        return self.report.evaluation.get(of, {}).get(measure)


def write_comparison(
    folders: Sequence[str | os.PathLike[str]],
    file: str | os.PathLike[str],
    png: str | os.PathLike[str] | None = None,
) -> list[Path]:
    """Write one page of several saved folders, and its pictures as PNG; return the files."""
    if len(folders) > MOST_RUNS:
        raise InputError(
            f"compare: takes at most {MOST_RUNS} folders, got {len(folders)}; compare fewer"
        )
    check_place(Path(file), "compare", "-o", begins_with(page.MARK))
    runs, notes = read_runs(folders)
    what = speed_of(runs)
    with pictures.drawing("compare") as figures:
        drawn = {
            name: scatter(figures, quality_points(runs, name), name, lower_is_better=is_low(name))
            for name in measures_of(runs)
        }
        drawn["speed"] = scatter(figures, speed_points(runs, what), SPEEDS[what[0]])
        written = document(runs, pictures.as_svg(drawn), notes)
        write_whole(Path(file), written, "compare", "-o")
        return [Path(file), *pictures.write(png, drawn, "compare")]


def read_runs(folders: Sequence[str | os.PathLike[str]]) -> tuple[list[Run], list[str]]:
    """Return what is stored of each folder, and what a reader has to know of it."""
    runs, notes = [], []
    names = [name_of(folder) for folder in folders]
    if len(set(names)) < len(names):  # folders of one name: told apart by their paths
        names = [text(os.fspath(folder), 100) for folder in folders]
    for number, (name, folder) in enumerate(zip(names, folders, strict=True), 1):
        report = Report.load(folder, "compare")
        bench, said = stored_bench(folder)
        runs.append(Run(number, name, report, bench))
        notes += [f"{name}: {each}" for each in said]
    return runs, notes + cautions(runs)


def cautions(runs: Sequence[Run]) -> list[str]:
    """Return why numbers of these runs don't compare, where they don't."""
    said = []
    models = sorted({run.report.model or "an unnamed model" for run in runs})
    if len(models) > 1:
        said.append(
            f"These are runs of {len(models)} different models: {_some(models)}. Perplexities of "
            "models with other tokenizers don't compare."
        )
    on = {
        (
            tables.measured_on(run.report.evaluation["pruned"]),
            text({**run.report.settings, **run.report.choices}.get("eval")),
        )
        for run in runs
        if tables.measures(run.report.evaluation)
    }
    if len(on) > 1:
        said.append(
            "Quality was measured on different text or windows of different length, and the "
            "numbers don't compare."
        )
    for measure in measures_of(runs):
        without = [run.name for run in runs if run.quality("pruned", measure) is None]
        if without:
            said.append(f"No {measure} was measured for {_some(without)}.")
    benches = [run.bench for run in runs if run.bench is not None]
    for name in CONDITIONS:
        values = sorted({text((b.settings | b.machine).get(name, "?")) for b in benches})
        if len(values) > 1:
            said.append(
                f"Speeds were measured with different {name} ({_some(values)}), and don't compare."
            )
    dense: dict[object, list[float]] = {}
    for run in runs:
        rate = run.rate(speed_of(runs))
        if rate and rate.dense and rate.dense.median > 0:
            model = run.report.model, run.bench.dense.params
            dense.setdefault(model, []).append(rate.dense.median)
    worst = max((max(each) / min(each) for each in dense.values()), default=1.0)
    if worst >= MOST_DRIFT:
        said.append(
            f"The dense model itself was {worst:.2f} times as fast in one measurement as in "
            "another: compare the ratios to it, which were measured in turns, and not tokens/s."
        )
    return said


def speed_of(runs: Sequence[Run]) -> What:
    """Return the speed, and the batch size, that most runs have."""
    rates = [rate for run in runs if run.bench for rate in run.bench.rates if rate.what in SPEEDS]
    found = Counter((rate.what, rate.batch) for rate in rates)
    return max(found, key=lambda what: (found[what], -what[1]), default=("decode", None))


def measures_of(runs: Sequence[Run]) -> list[str]:
    """Return what was measured of the models; the perplexity if nothing was."""
    found = {name for run in runs for name, *_ in tables.measures(run.report.evaluation)}
    return [name for name in tables.MEASURES if name in found] or ["perplexity"]


def is_low(measure: str) -> bool:
    """Tell whether a lower number is better."""
    return measure in ("perplexity", "divergence")


def quality_points(runs: Sequence[Run], measure: str) -> list[Point]:
    """Return the numbers of a measure, those of the dense models once each."""
    points = []
    for run in runs:
        for of, when, number in (("pruned", "after", run.number), ("dense", "before", None)):
            params, value = run.report.params.get(when), run.quality(of, measure)
            known = params and value is not None
            points += [Point(params, value, run.report.model, number)] if known else []
    return list(dict.fromkeys(points))


def speed_points(runs: Sequence[Run], what: What) -> list[Point]:
    """Return the rates of one kind and batch size, those of the dense models, too."""
    points = []
    for run in runs:
        rate, model = run.rate(what), run.report.model
        params = rate and (run.bench.pruned.params or run.report.params.get("after"))
        if params:
            points.append(Point(params, rate.pruned.median, model, run.number))
            if rate.dense and run.bench.dense.params:
                points.append(Point(run.bench.dense.params, rate.dense.median, model))
    return points


def document(runs: Sequence[Run], svgs: Mapping[str, str | None], notes: Sequence[str]) -> str:
    """Return the page as HTML; ``svgs`` has each measure and ``speed``, or None."""
    what, measures = speed_of(runs), measures_of(runs)
    speed = SPEEDS[what[0]] + ("" if what[1] is None else f", batch {what[1]}")
    heads = ("", "run", "parameters", *measures, speed, "model")
    rows = [_row(run, what, measures) for run in runs]
    title = f"Comparison of {len(runs)} pruned model{'s' if len(runs) != 1 else ''}"
    shown = []
    for name in measures:
        better = "Lower" if is_low(name) else "Higher"
        said = f"{better} is better. Filled: pruned, with its number in the table; hollow: dense."
        heading, missing = f"{name.capitalize()} against parameters", "liar prune with --eval TEXT"
        shown.append(page.picture(heading, svgs.get(name), said, f"Run {missing}."))
    said = f"Median {speed}; higher is better. Hollow: the dense model, in the same rounds."
    missing = "Run liar bench DIR --against MODEL."
    shown.append(page.picture("Speed against parameters", svgs.get("speed"), said, missing))
    return render(
        "page.html",
        command="compare",
        title=title,
        heading=title,
        warnings=notes,
        pictures=shown,
        sections=[Table("Runs", heads, rows, (1, len(heads) - 1))],
        end="In brackets: pruned / dense.",
    )


def _row(run: Run, what: What, measures: Sequence[str]) -> list[str]:
    rate = run.rate(what)
    before, after = (run.report.params.get(when) for when in ("before", "after"))
    share = f" ({after / before:.1%})" if before and after is not None else ""
    gain = f" (×\u00a0{rate.ratio.median:.3f})" if rate and rate.ratio else ""
    return [
        str(run.number),
        run.name,
        "–" if after is None else tables.magnitude(after) + share,
        *(_measure(run, each) for each in measures),
        tables.rate(rate.pruned.median) + gain if rate else "–",
        run.report.model or "–",
    ]


def _measure(run: Run, measure: str) -> str:
    dense, pruned = (run.quality(of, measure) for of in ("dense", "pruned"))
    change = f" ({page.change(dense, pruned)})" if pruned and dense not in (None, 1) else ""
    return tables.quality(pruned) + change


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
