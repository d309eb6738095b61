"""The pictures of a report: units kept, errors and seconds, drawn by matplotlib."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from liar_ext.report.canvas import COLOURS, FONT, WIDTH, decades
from liar_ext.report.reading import SavedReport, SavedSite

MOST_BARS = 96  # beyond, neighbouring layers share a bar
MOST_MARKERS = 48  # beyond, they would hide the line
MOST_STAGES = 12
MOST_KINDS = 3
SMALLEST, GREATEST = 1e-9, 1e3  # of an error that is drawn
KINDS = {"attn": "attention", "mlp": "MLP", "other": "other sites"}


def kept(report: SavedReport, figures: Any) -> Any | None:
    """Draw the units that each layer keeps, in front of those that it had; None without any."""
    from matplotlib.ticker import MaxNLocator

    groups = _by_kind(report, lambda site: None not in (site.units_before, site.units_after))
    if not groups:
        return None
    figure, axes = _panels(figures, len(groups), 1.7)
    for panel, (kind, sites) in zip(axes, groups.items(), strict=True):
        at, wide, before, after = _bars(
            sites, lambda site: (float(site.units_before), float(site.units_after))
        )
        panel.bar(at, before, wide, color=COLOURS["pale"], label="removed")
        panel.bar(at, after, wide, color=COLOURS["blue"], label="kept")
        share = sum(after) / max(sum(before), 1)
        panel.set_title(f"{_title(kind)}: {share:.0%} of the units stay", loc="left")
        panel.set_ylabel("units")
        panel.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    _finish(figure, axes, sum(groups.values(), []))
    return figure


def errors(report: SavedReport, figures: Any) -> Any | None:
    """Draw the errors of each pruned layer, relative to its dense output; None without any."""
    groups = _by_kind(
        report,
        lambda site: site.is_pruned and {site.error, site.holdout_error} != {None},
    )
    if not groups:
        return None
    figure, axes = _panels(figures, len(groups), 1.9)
    series = {
        "error": ("calibration", "faint", "o"),
        "holdout_error": ("held out", "orange", "D"),
        "certified_error": ("certified", "green", "s"),
    }
    for panel, (kind, sites) in zip(axes, groups.items(), strict=True):
        for name, (label, colour, marker) in series.items():
            points = _broken(
                [
                    (_place(i, s), y)
                    for i, s in enumerate(sites)
                    if (y := getattr(s, name)) is not None
                ]
            )
            if points:
                panel.plot(
                    *zip(*points, strict=True),
                    marker=marker,
                    markersize=3.5 if len(points) <= MOST_MARKERS else 1.5,
                    linewidth=1,
                    color=COLOURS[colour],
                    label=label,
                )
        panel.set_yscale("log")
        panel.set_ylim(*decades(panel.get_ylim()))
        panel.set_title(_title(kind), loc="left")
        panel.yaxis.set_major_formatter(_percent)
        panel.yaxis.set_minor_formatter("")
        panel.set_ylabel("error")
    _finish(figure, axes, sum(groups.values(), []))
    return figure


def time_spent(report: SavedReport, figures: Any) -> Any | None:
    """Draw the seconds of each stage; None without any."""
    stages = sorted(report.seconds.items(), key=lambda item: -item[1])
    stages = [(name, spent) for name, spent in stages if spent > 0]
    if not stages:
        return None
    if len(stages) > MOST_STAGES:
        rest = sum(spent for _, spent in stages[MOST_STAGES - 1 :])
        stages = [*stages[: MOST_STAGES - 1], ("other stages", rest)]
    figure = figures(figsize=(WIDTH, 0.7 + 0.28 * len(stages)), layout="constrained")
    panel = figure.subplots()
    names = [name if len(name) <= 18 else name[:17] + "…" for name, _ in stages]
    values = [spent for _, spent in stages]
    places = list(range(len(stages)))
    panel.barh(places, values, color=COLOURS["blue"], height=0.65)
    panel.set_yticks(places, names)
    panel.invert_yaxis()
    panel.set_xlim(0, max(values) * 1.2)
    for place, value in zip(places, values, strict=True):
        panel.annotate(
            f"{value:.3g}",
            (value, place),
            (4, 0),
            textcoords="offset points",
            va="center",
            fontsize=FONT - 1,
        )
    panel.set_xlabel("seconds")
    panel.tick_params(axis="y", length=0)
    return figure


def _by_kind(
    report: SavedReport, is_shown: Callable[[SavedSite], bool]
) -> dict[str, list[SavedSite]]:
    """Return the sites by kind, attention first, in the order of the layers."""
    groups: dict[str, list[SavedSite]] = {}
    for site in report.sites:
        if is_shown(site):
            groups.setdefault(site.kind if site.kind in KINDS else "other", []).append(site)
    order = [kind for kind in KINDS if kind in groups][:MOST_KINDS]
    return {kind: sorted(groups[kind], key=lambda site: site.block or 0) for kind in order}


def _panels(figures: Any, number: int, height: float) -> tuple[Any, Sequence[Any]]:
    figure = figures(figsize=(WIDTH, 0.6 + height * number), layout="constrained")
    return figure, figure.subplots(number, 1, sharex=True, squeeze=False)[:, 0]


def _place(index: int, site: SavedSite) -> int:
    return index if site.block is None else site.block


def _bars(
    sites: Sequence[SavedSite], read: Callable[[SavedSite], tuple[float, float]]
) -> tuple[list[float], float, list[float], list[float]]:
    """Return places, width, and two heights of bars: the means of layers that share one."""
    places = [_place(index, site) for index, site in enumerate(sites)]
    first, wide = min(places), 1 + (max(places) - min(places)) // MOST_BARS
    bins: dict[int, list[tuple[float, float]]] = {}
    for place, site in zip(places, sites, strict=True):
        bins.setdefault((place - first) // wide, []).append(read(site))
    at = [first + wide * (key + 0.5) - 0.5 for key in bins]
    means = [
        [sum(values) / len(values) for values in zip(*each, strict=True)] for each in bins.values()
    ]
    return at, 0.8 * wide, [mean[0] for mean in means], [mean[1] for mean in means]


def _broken(points: Sequence[tuple[int, float]]) -> list[tuple[float, float]]:
    """Return points within what is drawn, with a gap where a layer between two has none."""
    found: list[tuple[float, float]] = []
    for at, value in points:
        if found and at > found[-1][0] + 1:
            found.append((found[-1][0] + 0.5, math.nan))
        found.append((at, min(max(value, SMALLEST), GREATEST)))
    return found


def _finish(figure: Any, axes: Sequence[Any], sites: Sequence[SavedSite]) -> None:
    from matplotlib.ticker import MaxNLocator

    named = dict(
        (label, handle)
        for panel in axes
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    )
    figure.legend(named.values(), named.keys(), loc="outside upper left", ncols=3)
    for panel in axes:
        panel.grid(axis="y", linewidth=0.6)
        panel.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes[-1].set_xlabel("layer" if any(site.block is not None for site in sites) else "site")


def _percent(value: float, _: Any = None) -> str:
    return f"{100 * value:g} %"


def _title(kind: str) -> str:
    return KINDS[kind]
