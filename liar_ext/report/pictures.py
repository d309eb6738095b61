"""The pictures of pages: units kept, errors, seconds, and a number of several models.

In an SVG, colours are variables of the page's style, so that one picture serves light and dark, and
bars and points say their values to a pointer. Pictures are as wide as a phone.
"""

from __future__ import annotations

import io
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

from liar_ext.checkpoint.placing import check_place
from liar_ext.models.plan import kind_of
from liar_ext.reconstruction.solve import SiteRow
from liar_ext.system.errors import refusing
from liar_ext.system.files import atomic_write, made_folders

# On white, and what the page's style calls it.
COLOURS = {
    "ink": "#1f2933",
    "faint": "#7b8794",
    "grid": "#e4e7eb",
    "pale": "#cbd2d9",
    "blue": "#2b6cb0",
    "orange": "#c05621",
    "green": "#2f855a",
}
PNG_MARK = {"Software": "liar_ext"}
WIDTH = 5.0  # inches; 360 points, which a phone shows at about their size
FONT = 11.0  # points
SETTINGS = {
    "svg.fonttype": "none",  # text stays text
    "text.parse_math": False,  # a "$" in a name is a "$"
    "text.usetex": False,
    "axes.unicode_minus": True,
    "font.family": "sans-serif",
    "font.size": FONT,
    **dict.fromkeys(("axes.titlesize", "axes.labelsize"), FONT),
    **dict.fromkeys(("xtick.labelsize", "ytick.labelsize", "legend.fontsize"), FONT - 1),
    **dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), COLOURS["faint"]),
    **dict.fromkeys(("axes.labelcolor", "axes.titlecolor", "text.color"), COLOURS["ink"]),
    **dict.fromkeys(("xtick.labelcolor", "ytick.labelcolor"), COLOURS["ink"]),
    "grid.color": COLOURS["grid"],
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False),
    "axes.axisbelow": True,
}
MOST_MARKERS = 48  # beyond, they would hide the line
LOW, HIGH = 1e-9, 1e3  # of an error that is drawn
KINDS = {"attn": "attention", "mlp": "MLP", "other": "other sites"}
ERRORS = {  # by field: label, colour, marker
    "error": ("calibration", "faint", "o"),
    "holdout_error": ("held out", "orange", "D"),
    "certified_error": ("certified", "green", "s"),
}
POINT_COLOURS, POINT_MARKERS = ("blue", "orange", "green", "ink"), "osD^v"
Places = Sequence[tuple[int, SiteRow]]  # sites by the number of their layer
HOVER = "hover "  # begins the id of what says its value to a pointer
NEXT = "\x1f"  # between the values of points of one line


@contextmanager
def drawing(operation: str) -> Iterator[Any]:
    """Give the class of figures, with the settings of this module, and leave none behind."""
    with refusing(f"{operation}: pictures need matplotlib", "pip install matplotlib", Exception):
        import matplotlib
        from matplotlib.figure import Figure
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **SETTINGS}):
        yield Figure


def kept(sites: Sequence[SiteRow], figures: Any) -> Any | None:
    """Draw the units that each layer keeps, in front of those that it had; None without any."""
    shown = [site for site in sites if None not in (site.units_before, site.units_after)]
    return _by_kind(shown, figures, 1.7, _units)


def errors(sites: Sequence[SiteRow], figures: Any) -> Any | None:
    """Draw the errors of each pruned layer, relative to its dense output; None without any."""
    lost = [each for each in sites if each.is_pruned and {each.error, each.holdout_error} != {None}]
    kinds = {kind_of(site.name) for site in lost}
    return _by_kind([site for site in sites if kind_of(site.name) in kinds], figures, 1.9, _errors)


def _units(panel: Any, kind: str, places: Places) -> None:
    from matplotlib.ticker import MaxNLocator

    at, sites = zip(*places, strict=True)
    before, after = ([getattr(s, f"units_{when}") for s in sites] for when in ("before", "after"))
    removed = panel.bar(at, before, color=COLOURS["pale"], label="removed")
    stay = panel.bar(at, after, color=COLOURS["blue"], label="kept")
    for x, old, new, *bars in zip(at, before, after, removed, stay, strict=True):
        _say(f"{x}: {new:,} of {old:,} units stay", *bars)
    share = sum(after) / max(sum(before), 1)
    panel.set_title(f"{KINDS[kind]}: {share:.0%} of the units stay", loc="left")
    panel.set_ylabel("units")
    panel.yaxis.set_major_locator(MaxNLocator(4, integer=True))


def _errors(panel: Any, kind: str, places: Places) -> None:
    for name, (label, colour, marker) in ERRORS.items():
        known = [(x, getattr(site, name) if site.is_pruned else None) for x, site in places]
        points = [(x, math.nan if y is None else min(max(y, LOW), HIGH)) for x, y in known]
        if not all(math.isnan(y) for _, y in points):
            size = 3.5 if len(points) <= MOST_MARKERS else 1.5
            style = {"marker": marker, "markersize": size, "linewidth": 1}
            style |= {"color": COLOURS[colour], "label": label}
            (line,) = panel.plot(*zip(*points, strict=True), **style)
            values = [f"{x:g}: {y:.3%} {label}" for x, y in points if not math.isnan(y)]
            _say(NEXT.join(values), line)
    panel.set_yscale("log")
    panel.set_ylim(*_decades(panel.get_ylim()))
    panel.set_title(KINDS[kind], loc="left")
    panel.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
    panel.yaxis.set_minor_formatter("")
    panel.set_ylabel("error")


def time_spent(seconds: Mapping[str, float], figures: Any) -> Any | None:
    """Draw the seconds of each stage but ``total``; None without any."""
    known = (item for item in seconds.items() if item[1] > 0 and item[0] != "total")
    stages = sorted(known, key=itemgetter(1), reverse=True)
    if not stages:
        return None
    figure = figures(figsize=(WIDTH, 0.7 + 0.28 * len(stages)), layout="constrained")
    panel, places = figure.subplots(), range(len(stages))
    names = [name if len(name) <= 18 else name[:17] + "…" for name, _ in stages]
    bars = panel.barh(places, [each for _, each in stages], color=COLOURS["blue"], height=0.65)
    panel.set_yticks(places, names)
    panel.invert_yaxis()
    panel.set_xlim(0, stages[0][1] * 1.2)
    for place, bar, (name, spent) in zip(places, bars, stages, strict=True):
        _say(f"{name}: {spent:.3g} s", bar)
        _label(panel, f"{spent:.3g}", (spent, place), (4, 0), va="center")
    panel.set_xlabel("seconds")
    panel.tick_params(axis="y", length=0)
    return figure


@dataclass(frozen=True)
class Point:
    """A model in a comparison; dense ones have no number."""

    params: int
    value: float
    model: str
    number: int | None = None


def scatter(
    figures: Any, points: Sequence[Point], title: str, *, lower_is_better: bool = False
) -> Any | None:
    """Draw values against parameters, a colour for each model; None without any pruned one.

    Pruned models are filled and numbered, dense ones hollow. The vertical axis is logarithmic if
    values span more than a decade, and begins at zero unless lower is better.
    """
    points = [each for each in points if 0 < each.value < math.inf]
    if not any(each.number is not None for each in points):
        return None
    figure = figures(figsize=(WIDTH, 3.4), layout="constrained")
    panel, models = figure.subplots(), list(dict.fromkeys(each.model for each in points))
    for point in points:
        at, said = models.index(point.model), f"{point.value:.4g}, {point.params:,} parameters"
        colour = COLOURS[POINT_COLOURS[at % len(POINT_COLOURS)]]
        (drawn,) = panel.plot(
            [point.params / 1e6],
            [point.value],
            marker=POINT_MARKERS[at % len(POINT_MARKERS)],
            markersize=8,
            color=colour,
            markerfacecolor="none" if point.number is None else colour,
        )
        _say(f"{'dense' if point.number is None else point.number}: {said}", drawn)
    values = [each.value for each in points]
    if max(values) > 10 * min(values):
        panel.set_yscale("log")
        panel.set_ylim(*_decades((min(values), max(values) * 1.01)))
        panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        panel.yaxis.set_minor_formatter("")
    elif lower_is_better:
        panel.margins(y=0.15)
    else:
        panel.set_ylim(0, 1.15 * max(values))
    panel.margins(x=0.12)
    panel.set_xlabel("parameters, millions")
    panel.set_ylabel(title)
    panel.grid(linewidth=0.6)
    figure.draw_without_rendering()
    for place, numbers in _numbers(panel, points):
        _label(panel, numbers, place, (0, 7), ha="center", va="bottom")
    return figure


def as_svg(drawn: Mapping[str, Any | None]) -> dict[str, str | None]:
    """Return figures as ``<svg>`` elements that follow the style of the page around them."""
    return {name: figure and _svg(figure, name) for name, figure in drawn.items()}


def write(
    folder: str | os.PathLike[str] | None, drawn: Mapping[str, Any | None], operation: str
) -> list[Path]:
    """Write figures as PNG files, on white, into a folder; return the files."""
    if folder is None:
        return []
    there = {Path(folder) / f"{name}.png": figure for name, figure in drawn.items() if figure}
    plain = {"format": "png", "dpi": 200, "facecolor": "white", "metadata": PNG_MARK}
    failure = f"{operation}: can't write into {folder}"
    with refusing(failure, "give another with --png", OSError), made_folders(Path(folder)):
        for path in there:
            check_place(path, operation, "--png", _is_png)
        for path, figure in there.items():
            with atomic_write(path) as file:
                figure.savefig(file, **plain)
    return list(there)


def _is_png(path: Path) -> bool:
    with path.open("rb") as file:
        return b"Software\0liar_ext" in file.read(1000)


def _svg(figure: Any, name: str) -> str:
    import matplotlib

    output = io.StringIO()
    empty = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({"svg.hashsalt": name}):  # several share a page
        figure.savefig(output, format="svg", transparent=True, metadata=empty)
    picture = output.getvalue()
    picture = picture[picture.index("<svg") :]
    picture = re.sub(r"<(metadata|style)\b.*?</\1>", "", picture, flags=re.DOTALL)
    picture = re.sub(r' (?:width|height)="[\d.]+pt"', "", picture, count=2)
    groups = rf'<g id="{HOVER}([^"]*)">(.*?)(?=<g id="|$)'
    picture = re.sub(groups, _told, picture, flags=re.DOTALL)
    return re.sub(r"<[^!>][^>]*>", _restyled, picture)


def _told(group: re.Match) -> str:
    """Return a group of an SVG with its value as a title, or each mark with one of several."""
    said = [f"<title>{value}</title>" for value in group[1].split(NEXT)]
    if len(said) == 1:
        return f"<g>{said[0]}{group[2]}"
    return "<g>" + re.sub(r"(<use\b[^>]*)/>", lambda use: f"{use[1]}>{said.pop(0)}</use>", group[2])


def _restyled(found: re.Match) -> str:
    """Return a tag of an SVG with the page's colours and fonts; nobody refers to groups by name."""
    tag = re.sub('^<g id="[^"]*"', "<g", found[0])
    for name, colour in COLOURS.items():
        tag = tag.replace(colour, f"var(--{name})")
    tag = re.sub('font-family:[^;"]*;?', "", tag)
    return re.sub(r'font: ([\d.]+px)[^;"]*', r"font-size: \1", tag)


def _say(said: str, *artists: Any) -> None:
    """Let something that is drawn say this to a pointer; see :func:`_svg`."""
    for each in artists:
        each.set_gid(HOVER + said.replace('"', "'"))  # matplotlib escapes the rest


def _label(panel: Any, said: str, place: Any, shift: Any, **alignment: str) -> None:
    panel.annotate(said, place, shift, textcoords="offset points", fontsize=FONT - 1, **alignment)


def _decades(limits: tuple[float, float]) -> tuple[float, float]:
    """Return limits widened to powers of ten, so that two of them at least have their ticks."""
    low, high = (math.log10(limit) for limit in limits)
    return 10.0 ** math.floor(low), 10.0 ** math.ceil(high)


def _by_kind(
    sites: Sequence[SiteRow], figures: Any, height: float, draw: Callable[[Any, str, Places], None]
) -> Any | None:
    """Draw a panel for each kind of sites, attention first; None without any.

    Layers are counted anew in each part of a model, so that those have no place in one row.
    """
    from matplotlib.ticker import MaxNLocator

    groups: dict[str, list[tuple[int, SiteRow]]] = {}
    layers = [re.match(r"(\d{1,6})\.", site.name) for site in sites]
    for layer, site in zip(layers, sites, strict=True):
        kind = kind_of(site.name)
        group = groups.setdefault(kind if kind in KINDS else "other", [])
        group.append((int(layer[1]) if layer else len(group), site))
    if not groups:
        return None
    figure = figures(figsize=(WIDTH, 0.6 + height * len(groups)), layout="constrained")
    panels = figure.subplots(len(groups), 1, sharex=True, squeeze=False)[:, 0]
    named: dict[str, Any] = {}
    for panel, kind in zip(panels, (kind for kind in KINDS if kind in groups), strict=True):
        draw(panel, kind, sorted(groups[kind], key=itemgetter(0)))
        handles, labels = panel.get_legend_handles_labels()
        named |= zip(labels, handles, strict=True)
        panel.grid(axis="y", linewidth=0.6)
        panel.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    figure.legend(named.values(), named.keys(), loc="outside upper left", ncols=3)
    panels[-1].set_xlabel("layer" if any(layers) else "site")
    return figure


def _numbers(panel: Any, points: Sequence[Point]) -> list[tuple[tuple[float, float], str]]:
    """Return where labels go, and their numbers; points too near for two labels share one."""
    groups: list[list[tuple[Any, Any, int]]] = []
    for point in points:
        if point.number is not None:
            place = point.params / 1e6, point.value
            at = panel.transAxes.inverted().transform(panel.transData.transform(place))
            near = [each for each in groups if (abs(each[0][1] - at) < (0.12, 0.09)).all()]
            if not near:
                groups.append([])
            (near or groups[-1:])[0].append((place, at, point.number))
    labels = []
    for group in groups:
        more = f" +{len(group) - 3}" if len(group) > 3 else ""
        highest = max(group, key=lambda each: each[0][1])[0]
        labels.append((highest, ", ".join(str(number) for *_, number in group[:3]) + more))
    return labels
