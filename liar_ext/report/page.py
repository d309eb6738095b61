"""The page of one job: what it did, what that cost in quality, and what it took.

``page.html`` is the template of this page and of a comparison. Whatever is shown is escaped by it,
but pictures, which are SVG of our own.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from liar_ext.atomic_write import begins_with, check_place, write_whole
from liar_ext.benchmarking.stored import Benchmark, bench_file, read_bench
from liar_ext.errors import InputError
from liar_ext.report import pictures, tables
from liar_ext.report.reading import report_digest
from liar_ext.report.report import Report
from liar_ext.report.tables import quality
from liar_ext.untrusted import text

# The first line of every page, by which it may be overwritten.
MARK = "<!DOCTYPE html><!-- liar report -->\n"
MOST_ROWS = 512  # of a table
MEASURE_SPEED = "liar bench DIR --against MODEL measures it."
MEASURE_QUALITY = "Quality: liar prune --eval TEXT measures it."
SAID = ("criterion", "allocation", "schedule")  # choices that are named at the top


def page_file(folder: str | os.PathLike[str]) -> Path:
    """Return where the page of a folder goes: beside it, for the folder itself is sealed."""
    path = Path(folder).resolve()
    return path.with_name(f"{path.name}.html")


def name_of(folder: str | os.PathLike[str]) -> str:
    """Return the name of a folder as a page shows it."""
    return text(Path(folder).resolve().name or str(folder), 100)


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
    check_place(target, "report", "-o", begins_with(MARK))
    report, name = Report.load(folder), name_of(folder)
    bench, notes = stored_bench(folder)
    model = report.model or "an unnamed model"
    is_judged = bool(tables.measures(report.evaluation))
    with pictures.drawing("report") as figures:
        drawn = {
            "units": pictures.kept(report.sites, figures),
            "errors": pictures.errors(report.sites, figures),
            "seconds": pictures.time_spent(report.seconds, figures),
        }
        written = document(
            "report",
            f"{name}: pruned from {model}",
            name,
            f"Pruned from {model}{_choices(report)}.",
            warnings=[*notes, *report.warnings],
            tiles=_tiles(report, bench),
            pictures=_pictures(report, pictures.as_svg(drawn)),
            sections=[
                (report.sizes(), "" if is_judged else MEASURE_QUALITY),
                (tables.speed(bench), "" if bench else MEASURE_SPEED),
            ],
            loading=report.loading,
            folded=report.tables(),
        )
        write_whole(target, written, "report", "-o")
        return [target, *pictures.write(png, drawn, "report")]


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


def document(command: str, title: str, heading: str, intro: str = "", **parts: Any) -> str:
    """Return a page as HTML, of parts that ``page.html`` names."""
    known = {"tiles": (), "loading": "", "folded": (), "end": "", "most_rows": MOST_ROWS}
    return _template().render(
        command=command, title=title, heading=heading, intro=intro, **{**known, **parts}
    )


def picture(title: str, svg: str | None, caption: str, missing: str) -> dict[str, Any]:
    """Return a picture with its title and caption, or what is missing for it."""
    label = escape(f"{title}. {caption}")
    svg = svg and Markup(svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1))
    return {"title": title, "svg": svg, "caption": caption, "missing": missing}


def change(before: float, after: float) -> str:
    """Return the ratio of two numbers as text."""
    return f"×\u00a0{after / before:.3f}" if before else ""


def magnitude(value: float) -> str:
    """Return a count in millions or billions, as models are named by."""
    for unit, word in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:.4g}\u00a0{word}"
    return f"{value:,}"


def _template() -> Any:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    environment.filters["code"] = lambda value: Markup(
        re.sub("`([^`]*)`", r"<code>\1</code>", str(escape(value)))
    )
    return environment.get_template("page.html")


def _choices(report: Report) -> str:
    """Return the choices that matter most, as the end of a sentence."""
    known = {**report.budget, **report.settings, **report.choices}
    said = []
    if "keep" in known:
        said.append(f"{text(known['keep'])} of {text(known.get('of', 'its parameters'))} kept")
    said += [f"{word} {text(known[word])}" for word in SAID if word in known]
    return f" ({', '.join(said)})" if said else ""


def _tiles(report: Report, bench: Benchmark | None) -> list[tuple[str, str, str, float | None]]:
    """Return numbers to be seen first: title, value, what stands under it, and the part kept."""
    tiles, found = [], report.evaluation
    nothing = "–", "not measured", None
    for title, part in tables.SIZES.items():
        before, after = (report.params.get(f"{part}{when}") for when in ("before", "after"))
        known = before and after is not None
        under = known and f"{magnitude(before)} → {magnitude(after)}"
        tile = (f"{after / before:.1%}", under, min(after / before, 1)) if known else nothing
        tiles.append((title, *tile))
    measured = tables.measures(found)
    for name, dense, pruned in measured:
        value = change(dense, pruned) if name == "perplexity" else quality(pruned)
        tiles.append((name, value, f"{quality(dense)} → {quality(pruned)}", None))
    if not measured and "certified" not in found:
        tiles.append(("quality", *nothing))
    if "certified" in found:
        outputs = tables.figure(found["certified"].get("rows"), ",")
        under = f"from the dense model, certified, {outputs} outputs"
        tiles.append(("divergence", tables.figure(found["certified"]["divergence"]), under, None))
    for what, title in (("decode", "greedy decoding"), ("encode", "encoding")):
        rate = bench.rate(what) if bench else None
        if rate is not None and rate.ratio is not None:
            under = f"pruned / dense, batch {rate.batch}"
            tiles.append((f"speed, {title}", f"× {rate.ratio.median:.2f}", under, None))
    if "total" in report.seconds:
        tiles.append(("time spent", _duration(report.seconds["total"]), "for the whole job", None))
    return tiles


def _pictures(report: Report, svgs: dict[str, str | None]) -> list[dict[str, Any]]:
    is_certified = any(site.certified_error is not None for site in report.sites)
    more = "; certified: on text that no decision has seen." if is_certified else "."
    return [
        picture(
            "Units kept per layer",
            svgs["units"],
            "Heads, or groups of heads that share keys, and MLP channels: of each layer what was "
            "there and what stays.",
            "The report names no site with its units.",
        ),
        picture(
            "Error per layer",
            svgs["errors"],
            "Of a pruned layer's output, relative to its energy before. Held out: solved on one "
            f"half of the calibration documents, measured on the other{more}",
            "No site of the report was pruned and has an error.",
        ),
        picture(
            "Time spent",
            svgs["seconds"],
            "Seconds by stage of the job.",
            "The report has no seconds.",
        ),
    ]


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
