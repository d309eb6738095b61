"""The page of a job, and that of several jobs, compared, by the template ``page.html``."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

from markupsafe import Markup, escape

from liar_ext.checkpoint.folder import REPORT_JSON
from liar_ext.checkpoint.placing import check_place
from liar_ext.measure.speed import Benchmark, Rate
from liar_ext.report import pictures, sections, tables
from liar_ext.report.pictures import Point, scatter
from liar_ext.report.reading import stored_bench
from liar_ext.report.report import Report
from liar_ext.report.tables import Table, magnitude, quality, ratio, render
from liar_ext.system.errors import typed
from liar_ext.system.files import begins_with, text, write_whole

# The first line of every page, by which it may be overwritten.
MARK = "<!DOCTYPE html><!-- liar report -->\n"
UNNAMED = "an unnamed model"


def name_of(folder: str | os.PathLike[str]) -> str:
    """Return the name of a folder as a page shows it."""
    return text(Path(os.path.realpath(folder)).name or str(folder), 100)


def write_page(
    folder: str | os.PathLike[str],
    file: str | os.PathLike[str] | None = None,
    png: str | os.PathLike[str] | None = None,
) -> list[Path]:
    """Write the page of a saved folder, and its pictures as PNG into ``png``; return the files.

    The page goes to ``DIR.html`` by default: beside the folder, which itself is sealed.
    """
    if file is None:
        place = Path(os.path.realpath(folder))
        file = place.with_name(f"{place.name}.html")
    target = Path(file)
    report, name = Report.load(folder), name_of(folder)
    check_place(target, "report", "-o", partial(begins_with, MARK))
    bench, notes = stored_bench(folder)
    model = report.model or UNNAMED
    with pictures.drawing("report") as figures:
        drawn = {
            "units": pictures.kept(report.sites, figures),
            "errors": pictures.errors(report.sites, figures),
            "seconds": pictures.time_spent(report.seconds, figures),
        }
        written = render(
            "page.html",
            command="report",
            title=f"{name}: pruned from {model}",
            heading=name,
            intro=f"Pruned from {model}.",
            verdict=report.verdict(),
            commands=commands(folder, report, bench is not None),
            warnings=[*notes, *report.warnings],
            tiles=_tiles(report, bench),
            pictures=_pictures(report, pictures.as_svg(drawn)),
            sections=[report.sizes(), *([sections.speed(bench)] if bench else [])],
            loading=report.loading,
            folded=report.tables(),
            numbers=quote(os.path.relpath(Path(folder, REPORT_JSON), target.parent).encode()),
        )
        write_whole(target, written, "report", "-o")
        return [target, *pictures.write(png, drawn, "report")]


def commands(
    folder: str | os.PathLike[str], report: Report, is_timed: bool
) -> list[tuple[str, str]]:
    """Return what to do next with a saved folder: in words, and a line to type."""
    place = text(os.fspath(folder))
    found, shell = report.loader, typed(place)
    load = f"liar_ext.load_pruned({place!r})"
    if found:
        load = f"transformers.{found[0]}.from_pretrained({place!r}{found[1]})"
    check = "Check that it reloads with the same outputs", f"liar verify {shell}"
    if not report.evaluation:
        check = "Measure its quality on your text", f"liar eval {shell} --text held_out.jsonl"
    dense = report.dense_beside(folder)
    last = "Time it against the dense model", f"liar bench {shell} --against {dense}"
    if is_timed:
        form = "gguf" if "CausalLM" in load else "onnx"
        last = "Export it to another format", f"liar export {shell} --to {form}"
    return [("Load it in Python", load), check, last]


def picture(title: str, svg: str | None, caption: str, missing: str = "") -> dict[str, Any]:
    """Return a picture with its title and caption, or what is missing for it."""
    label = escape(f"{title}. {caption}")
    svg = svg and Markup(svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1))
    return {"title": title, "svg": svg, "caption": caption, "missing": missing}


def _tiles(report: Report, bench: Benchmark | None) -> list[tuple[str, str, str, float | None]]:
    """Return numbers to be seen first: title, value, what stands under it, and the part kept."""
    tiles, found = [], report.evaluation
    before, after = (report.params.get(when) for when in ("before", "after"))
    if before and after is not None:
        under = f"{magnitude(before)} → {magnitude(after)}"
        tiles.append(("parameters", f"{after / before:.1%}", under, min(after / before, 1)))
        if report.dtype in tables.BYTES:
            whole, left = (tables.megabytes(count, report.dtype) for count in (before, after))
            tiles.append(("weights", left, f"{whole} before, {report.dtype}", None))
    for name, dense, pruned in tables.measures(found):
        change = f"×\u00a0{ratio(dense, pruned)}"
        value = change if name == "perplexity" else quality(pruned)
        tiles.append((name, value, f"{quality(dense)} → {quality(pruned)}", None))
    if "certified" in found:
        outputs = tables.figure(found["certified"].get("rows"), ",")
        under = f"from the dense model, certified, {outputs} outputs"
        tiles.append(("divergence", tables.figure(found["certified"]["divergence"]), under, None))
    for what, title in (("decode", "greedy decoding"), ("encode", "encoding")):
        rate = bench.rate(what) if bench else None
        if rate is not None:
            under = f"pruned / dense, batch {rate.batch}"
            tiles.append((f"speed, {title}", f"× {rate.ratio.median:.2f}", under, None))
    if "total" in report.seconds:
        total = report.seconds["total"]
        spent = f"{total / 60:.1f} min" if total < 7200 else f"{total / 3600:.1f} h"
        spent = f"{total:.3g} s" if total < 120 else spent
        tiles.append(("time spent", spent, "for the whole job", None))
    return tiles


def _pictures(report: Report, svgs: dict[str, str | None]) -> list[dict[str, Any]]:
    is_certified = any(site.certified_error is not None for site in report.sites)
    more = "; certified: on text that no decision has seen." if is_certified else "."
    units = "Units removed and kept: heads, or groups that share keys, and MLP channels."
    errors = (
        "Of a pruned layer's output, relative to its energy before. Held out: solved on one half "
        f"of the calibration documents, measured on the other{more}"
    )
    shown = [
        picture("Units kept per layer", svgs["units"], units),
        picture("Error per layer", svgs["errors"], errors),
        picture("Time spent", svgs["seconds"], "Seconds by stage of the job."),
    ]
    return [each for each in shown if each["svg"]]


MOST_DRIFT = 1.1  # of a dense model's speed between measurements
# What two measurements must share to be compared.
CONDITIONS = ("dtype", "device", "threads", "prompt_length", "new_tokens", "cpu")
LOW = ("perplexity", "divergence")  # measures of which a lower number is better
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
    check_place(Path(file), "compare", "-o", partial(begins_with, MARK))
    runs, notes = read_runs(folders)
    what, measures = speed_of(runs), measures_of(runs)
    title = f"Comparison of {len(runs)} pruned model{'s' if len(runs) != 1 else ''}"
    speed = SPEEDS[what[0]] + ("" if what[1] is None else f", batch {what[1]}")
    heads = ("", "run", "parameters", *measures, speed, "model")
    rows = [_row(run, what, measures) for run in runs]
    with pictures.drawing("compare") as figures:
        drawn = {
            name: scatter(figures, quality_points(runs, name), name, lower_is_better=name in LOW)
            for name in measures
        }
        drawn["speed"] = scatter(figures, speed_points(runs, what), SPEEDS[what[0]])
        written = render(
            "page.html",
            command="compare",
            title=title,
            heading=title,
            warnings=notes,
            pictures=_plots(measures, speed, pictures.as_svg(drawn)),
            sections=[Table("Runs", heads, rows, (1, len(heads) - 1))],
            end="In brackets: pruned / dense.",
        )
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
    models = sorted({run.report.model or UNNAMED for run in runs})
    if len(models) > 1:
        said.append(
            f"These are runs of {len(models)} different models: {', '.join(models)}. Perplexities "
            "of models with other tokenizers don't compare."
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
    benches = [run.bench for run in runs if run.bench is not None]
    for name in CONDITIONS:
        values = sorted({text((b.settings | b.machine).get(name, "?")) for b in benches})
        if len(values) > 1:
            said.append(
                f"Speeds were measured with different {name} ({', '.join(values)}), and don't "
                "compare."
            )
    dense: dict[object, list[float]] = {}
    for run in runs:
        rate = run.rate(speed_of(runs))
        if rate and rate.dense.median > 0:
            dense.setdefault(run.report.model, []).append(rate.dense.median)
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


def quality_points(runs: Sequence[Run], measure: str) -> list[Point]:
    """Return the numbers of a measure, those of the dense models once each."""
    points = [
        Point(run.report.params.get(when), run.quality(of, measure), run.report.model, number)
        for run in runs
        for of, when, number in (("pruned", "after", run.number), ("dense", "before", None))
    ]
    return [each for each in dict.fromkeys(points) if each.params and each.value is not None]


def speed_points(runs: Sequence[Run], what: What) -> list[Point]:
    """Return the rates of one kind and batch size, those of the dense models, too."""
    points = []
    for run in runs:
        rate, model = run.rate(what), run.report.model
        params = rate and (run.bench.pruned.params or run.report.params.get("after"))
        if params:
            points.append(Point(params, rate.pruned.median, model, run.number))
            if run.bench.dense.params:
                points.append(Point(run.bench.dense.params, rate.dense.median, model))
    return points


def _plots(
    measures: Sequence[str], speed: str, svgs: Mapping[str, str | None]
) -> list[dict[str, Any]]:
    shown = []
    for name in measures:
        better = "Lower" if name in LOW else "Higher"
        said = f"{better} is better. Filled: pruned, with its number in the table; hollow: dense."
        heading, missing = f"{name.capitalize()} against parameters", "liar prune with --eval TEXT"
        shown.append(picture(heading, svgs.get(name), said, f"Run {missing}."))
    said = f"Median {speed}; higher is better. Hollow: the dense model, in the same rounds."
    missing = "Run liar bench DIR --against MODEL."
    return [*shown, picture("Speed against parameters", svgs.get("speed"), said, missing)]


def _row(run: Run, what: What, measures: Sequence[str]) -> list[str]:
    rate = run.rate(what)
    before, after = (run.report.params.get(when) for when in ("before", "after"))
    share = f" ({after / before:.1%})" if before and after is not None else ""
    return [
        str(run.number),
        run.name,
        "–" if after is None else magnitude(after) + share,
        *(_measure(run, each) for each in measures),
        f"{tables.rate(rate.pruned.median)} (×\u00a0{rate.ratio.median:.3f})" if rate else "–",
        run.report.model or "–",
    ]


def _measure(run: Run, measure: str) -> str:
    dense, pruned = (run.quality(of, measure) for of in ("dense", "pruned"))
    change = ratio(dense, pruned) if pruned and dense != 1 else ""
    return quality(pruned) + (f" (×\u00a0{change})" if change else "")
