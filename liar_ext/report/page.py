"""The page of one job: what it did, what that cost in quality, and what it took.

``page.html`` is the template of this page and of a comparison. Whatever is shown is escaped by it,
but pictures, which are SVG of our own.
"""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Any
from urllib.parse import quote

from markupsafe import Markup, escape

from liar_ext.atomic_write import begins_with, check_place, write_whole
from liar_ext.checkpoint.names import REPORT_JSON
from liar_ext.errors import InputError
from liar_ext.measure.timing import Benchmark, bench_file, read_bench
from liar_ext.report import pictures, sections, tables
from liar_ext.report.reading import report_digest
from liar_ext.report.report import Report
from liar_ext.report.tables import magnitude, quality, render
from liar_ext.untrusted import text

# The first line of every page, by which it may be overwritten.
MARK = "<!DOCTYPE html><!-- liar report -->\n"


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
    """Write the page of a saved folder, and its pictures as PNG into ``png``; return the files.

    The page goes to ``DIR.html`` beside the folder by default.
    """
    target = page_file(folder) if file is None else Path(file)
    check_place(target, "report", "-o", begins_with(MARK))
    report, name = Report.load(folder), name_of(folder)
    bench, notes = stored_bench(folder)
    model = report.model or "an unnamed model"
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
            sections=[report.sizes(), sections.speed(bench)],
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
    found, shell = report.loader, shlex.quote(place)
    load = f"liar_ext.load_pruned({place!r})"
    if found:
        load = f"transformers.{found[0]}.from_pretrained({place!r}{found[1]})"
    check = "Check that it reloads with the same outputs", f"liar verify {shell}"
    if not report.evaluation:
        check = "Measure its quality on your text", f"liar eval {shell} --text held_out.jsonl"
    dense = shlex.quote(report.model or "MODEL")
    last = "Time it against the dense model", f"liar bench {shell} --against {dense}"
    if is_timed:
        form = "gguf" if "CausalLM" in load else "onnx"
        last = "Export it to another format", f"liar export {shell} --to {form}"
    return [("Load it in Python", load), check, last]


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


def picture(title: str, svg: str | None, caption: str, missing: str = "") -> dict[str, Any]:
    """Return a picture with its title and caption, or what is missing for it."""
    label = escape(f"{title}. {caption}")
    svg = svg and Markup(svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1))
    return {"title": title, "svg": svg, "caption": caption, "missing": missing}


def change(before: float, after: float) -> str:
    """Return the ratio of two numbers as text."""
    return f"×\u00a0{after / before:.3f}" if before else ""


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
        value = change(dense, pruned) if name == "perplexity" else quality(pruned)
        tiles.append((name, value, f"{quality(dense)} → {quality(pruned)}", None))
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
    said = {
        "units": "Units kept per layer|Units removed and kept: heads, or groups that share "
        "keys, and MLP channels.",
        "errors": "Error per layer|Of a pruned layer's output, relative to its energy before. Held "
        f"out: solved on one half of the calibration documents, measured on the other{more}",
        "seconds": "Time spent|Seconds by stage of the job.",
    }
    there = {name: each.split("|") for name, each in said.items() if svgs[name]}
    return [picture(title, svgs[name], caption) for name, (title, caption) in there.items()]


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
