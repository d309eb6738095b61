"""The picture of a comparison: a number of each model against its parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from liar_ext.report.canvas import COLOURS, FONT, WIDTH, decades

POINT_COLOURS, POINT_MARKERS = ("blue", "orange", "green", "ink"), "osD^v"


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

    Parameters
    ----------
    figures : type
        From :func:`drawing`.
    points : sequence of Point
        Pruned models are filled and numbered, dense ones hollow.
    title : str
        Of the vertical axis, which is logarithmic where values span more than a decade.
    lower_is_better : bool
        Whether the axis may leave zero out.
    """
    points = [each for each in points if each.value > 0]
    if not any(each.number is not None for each in points):
        return None
    figure = figures(figsize=(WIDTH, 3.4), layout="constrained")
    panel = figure.subplots()
    models = list(dict.fromkeys(each.model for each in points))
    for index, model in enumerate(models):
        colour = COLOURS[POINT_COLOURS[index % len(POINT_COLOURS)]]
        mine = sorted((p for p in points if p.model == model), key=lambda p: p.params)
        for dense in (True, False):
            chosen = [each for each in mine if (each.number is None) == dense]
            panel.plot(
                [each.params / 1e6 for each in chosen],
                [each.value for each in chosen],
                linestyle="none",
                marker=POINT_MARKERS[index % len(POINT_MARKERS)],
                markersize=8,
                color=colour,
                markerfacecolor="none" if dense else colour,
            )
    values = [each.value for each in points]
    if max(values) > 10 * min(values):
        panel.set_yscale("log")
        panel.set_ylim(*decades((min(values), max(values) * 1.01)))
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
    for (x, y), numbers in _labels(panel, points):
        panel.annotate(
            numbers,
            (x, y),
            (0, 7),
            textcoords="offset points",
            ha="center",
            va="bottom",
            fontsize=FONT - 1,
        )
    return figure


def _labels(panel: Any, points: Sequence[Point]) -> list[tuple[tuple[float, float], str]]:
    """Return where labels go, and their numbers; points too near for two labels share one."""
    groups: list[list[tuple[Any, Any, int]]] = []
    for point in points:
        if point.number is None:
            continue
        place = point.params / 1e6, point.value
        at = panel.transAxes.inverted().transform(panel.transData.transform(place))
        near = (
            group
            for group in groups
            if abs(group[0][1][0] - at[0]) < 0.12 and abs(group[0][1][1] - at[1]) < 0.09
        )
        group = next(near, None)
        if group is None:
            groups.append(group := [])
        group.append((place, at, point.number))
    labels = []
    for group in groups:
        numbers = [str(number) for *_, number in group]
        more = f" +{len(numbers) - 3}" if len(numbers) > 3 else ""
        highest = max(group, key=lambda each: each[0][1])[0]
        labels.append((highest, ", ".join(numbers[:3]) + more))
    return labels
