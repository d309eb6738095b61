"""Draw docs/plots/*.svg, and write the tables of pages, from docs/data: ``make figures``.

A file of docs/data has a command, and the columns and rows that it printed. A page names a table by
``<!-- data: NAME 1+2 3 4 -->``, with the columns to show (``+`` joins some) and, after ``|``,
``COLUMN=VALUE`` for the rows. A picture keeps the digest of what it was drawn from.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DATA, PLOTS = ROOT / "docs" / "data", ROOT / "docs" / "plots"
MARK = re.compile(
    r"(<!-- data: (\S+)((?: [\d+]+)+)(?: \| (.+?)=(.+?))? -->)\n.*?(<!-- end -->)", re.S
)
MOST = 400  # perplexities above are off the picture
COLOURS = {
    "liar_ext": "#2f855a",
    "FLAP": "#c05621",
    "GRAIL, FLAP's units": "#2b6cb0",
    "GRAIL, SlimGPT's units": "#805ad5",
    "SliceGPT": "#7b8794",
}


def read(name: str) -> dict[str, Any]:
    """Return a file of docs/data."""
    return json.loads((DATA / f"{name}.json").read_text(encoding="utf-8"))


def digest(names: tuple[str, ...]) -> str:
    """Return what a picture of these data keeps."""
    files = [DATA / f"{name}.json" for name in names]
    return " ".join([*names, sha256(b"".join(file.read_bytes() for file in files)).hexdigest()])


def number(cell: str) -> float:
    """Return the first number of a cell."""
    return float(re.search(r"[\d.]+", cell)[0])


def table(name: str, columns: str, field: str | None, value: str | None) -> str:
    """Return some columns of the data as a table of Markdown."""
    data = read(name)
    places = [[int(at) - 1 for at in each.split("+")] for each in columns.split()]
    rows = [row for row in data["rows"] if not field or row[data["columns"].index(field)] == value]
    lines = [
        [", ".join(row[at] for at in each) for each in places] for row in [data["columns"], *rows]
    ]
    lines.insert(1, ["---"] * len(places))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def placed(page: str) -> str:
    """Return a page with its tables as the data have them."""
    return MARK.sub(lambda m: f"{m[1]}\n\n{table(m[2], m[3], m[4], m[5])}\n\n{m[6]}", page)


def overview(figure) -> None:
    """Draw perplexity on text that nothing was calibrated on, against the fraction removed."""
    _peers(figure, 3, "Perplexity on web pages: SmolLM2-135M, calibrated on WikiText-2")


def peers(figure) -> None:
    """Draw perplexity on the text that all methods were calibrated on."""
    _peers(figure, 2, "Perplexity on WikiText-2, which all methods were calibrated on")


def _peers(figure, place: int, title: str) -> None:
    axes, data = figure.subplots(), read("peers")
    dense = float(re.search(r"dense ([\d.]+)", data["columns"][place])[1])
    for label, colour in COLOURS.items():
        method = "`liar`, the default" if label == "liar_ext" else label
        rows = [row for row in data["rows"] if row[0] == method]
        points = [(0, dense), *((number(row[1]), number(row[place])) for row in rows)]
        width = 3 if label == "liar_ext" else 1.6
        axes.plot(*zip(*points, strict=True), "o-", color=colour, label=label, lw=width)
    axes.set(yscale="log", ylim=(dense * 0.93, MOST), xticks=[0, 20, 30, 50], title=title)
    axes.set_yticks([tick for tick in (20, 30, 50, 100, 200, 400) if tick > dense])
    axes.yaxis.set_major_formatter("{x:.0f}")
    axes.minorticks_off()
    axes.set(
        xlabel="% of attention and MLP parameters removed", ylabel="perplexity, lower is better"
    )
    axes.legend(loc="upper left")


def default(figure) -> None:
    """Draw the mean gap to the dense model against the fraction removed, of two models."""
    methods = {
        "`liar`": ("liar_ext", COLOURS["liar_ext"]),
        "`wifv+global+bias`": ("FLAP's way", COLOURS["FLAP"]),
    }
    for axes, (name, title) in zip(
        figure.subplots(1, 2, sharey=True),
        {"smollm2": "SmolLM2-135M", "gemma": "Gemma-3-270m"}.items(),
        strict=True,
    ):
        for method, (label, colour) in methods.items():
            rows = [row for row in read(name)["rows"] if row[1] == method]
            for seed, style in (("0", "o-"), ("1", "o--")):
                points = [(number(row[0]), number(row[7])) for row in rows if row[2] == seed]
                axes.plot(
                    *zip(*points, strict=True), style, color=colour, label=f"{label}, seed {seed}"
                )
        axes.set(title=title, xticks=[20, 30, 50], ylim=(0, 4.5), xlabel="% removed")
    figure.axes[0].set_ylabel("mean of log(perplexity / dense)")
    figure.axes[0].legend(loc="upper left")


def encoders(figure) -> None:
    """Draw what encoders keep of the dense model's score, against the fraction kept."""
    names = ("MPNet", "MiniLM-L3", "MiniLM-L6", "bge-small", "e5-small")
    colours = dict(zip(names, COLOURS.values(), strict=False))
    titles = {"STS-B": "STS-B, text like the calibration's", "news": "news, other text"}
    for axes, (task, title) in zip(figure.subplots(1, 2, sharey=True), titles.items(), strict=True):
        for encoder, colour in colours.items():
            rows = [
                row for row in read("encoders")["rows"] if row[:2] == [task, encoder] and row[4]
            ]
            points = [(100 * float(row[2]), number(row[4])) for row in rows]
            if points:
                axes.plot(*zip(*points, strict=True), "o-", color=colour, label=encoder)
        axes.axhline(100, color="#7b8794", linewidth=1, linestyle=":")
        axes.set(
            title=title, xticks=[25, 35, 50], ylim=(86, 102), xlabel="% of heads and channels kept"
        )
    figure.axes[0].set_ylabel("% of the dense score")
    figure.axes[0].legend(loc="lower right")


def calibration(figure) -> None:
    """Draw the mean gap by what is calibrated on beside the named text."""
    kinds = ("nothing", "random tokens", "text of its own")
    rows = [row for row in read("calibration")["rows"] if row[1] in kinds]
    for axes, removed in zip(figure.subplots(1, 2), ("20 %", "50 %"), strict=True):
        for seed, shade in (("0", "#2f855a"), ("1", "#9ae6b4")):
            values = [number(row[7]) for row in rows if row[0] == removed and row[2] == seed]
            places = [at + (0.2 if seed == "1" else -0.2) for at in range(len(kinds))]
            bars = axes.barh(places, values, 0.38, color=shade, label=f"seed {seed}")
            axes.bar_label(bars, fmt="%.2f", padding=2)
        axes.set(
            yticks=range(len(kinds)), yticklabels=kinds, title=f"SmolLM2-135M, {removed} removed"
        )
        axes.set(xlabel="mean of log(perplexity / dense)", xlim=(0, 1.18 * max(values)))
        axes.invert_yaxis()
    figure.axes[1].set_yticklabels([])
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)


def steps(figure) -> None:
    """Draw perplexity by what is added to pruning by importance alone."""
    labels = {
        "`wanda+uniform+none`": "scores alone",
        "`wanda+uniform+linear`": "+ least squares",
        "`obs+uniform+linear`": "+ units by the error after it",
        "`obs+curve+auto`": "+ sizes by measured sensitivity",
        "`obs+curve+auto+layerwise`": "+ layer by layer",
    }
    axes = figure.subplots()
    rows = {row[1]: row for row in read("steps")["rows"] if row[0] == "WikiText-2"}
    values = [number(rows[name][2]) for name in labels]
    bars = axes.barh(list(labels.values()), values, color=COLOURS["liar_ext"])
    axes.bar_label(bars, fmt="%.1f", padding=2)
    axes.invert_yaxis()
    axes.set(title="SmolLM2-135M, 20 % removed, WikiText-2", xlabel="perplexity, dense 26.97")


def gram(figure) -> None:
    """Draw how much longer than the Gram update other ways take."""
    axes = figure.subplots()
    rows = [row for row in read("gram")["rows"] if row[1] == "bfloat16"]
    for offset, place, label, colour in (
        (-0.2, 4, "torch's product", COLOURS["GRAIL, FLAP's units"]),
        (0.2, 5, "float32 copy, product, add", COLOURS["FLAP"]),
    ):
        values = [float(re.search(r"([\d.]+)×", row[place])[1]) for row in rows]
        places = [at + offset for at in range(len(rows))]
        axes.bar_label(
            axes.barh(places, values, 0.38, color=colour, label=label), fmt="%.1f", padding=2
        )
    axes.set(yticks=range(len(rows)), yticklabels=[row[0] for row in rows], xlabel="times as long")
    axes.set(title="bfloat16, beside gram_update_, Zen 4, one core")
    axes.invert_yaxis()
    axes.legend(loc="center right")


def healing(figure) -> None:
    """Draw the mean gap against the tokens that a model is healed with, by its start."""
    rows = read("healing")["rows"]
    removed = list(dict.fromkeys(row[0] for row in rows))
    healed = list(dict.fromkeys(row[1] for row in rows if row[2] != "0" and "," not in row[1]))
    panels = figure.subplots(1, len(removed), squeeze=False, sharex=True, sharey=True)[0]
    for axes, part in zip(panels, removed, strict=True):
        for name, colour in zip(healed, COLOURS.values(), strict=False):
            points = [
                (float(row[2].replace(",", "")) / 1000, number(row[7]))
                for row in rows
                if row[:2] == [part, name]
            ]
            xs, ys = zip(*points, strict=True) if points else ((), ())
            axes.plot(xs, ys, "o-", color=colour, label=name.replace("`", ""))
        axes.set(title=f"{part} removed", xlabel="thousand tokens of healing")
    figure.suptitle("SmolLM2-135M-Instruct")
    panels[0].set_ylim(bottom=0)
    panels[0].set_ylabel("mean of log(perplexity / dense)")
    panels[0].legend(loc="best")


def vocabulary(figure) -> None:
    """Draw what models lose on each text, alone by tokens removed."""
    rows = read("vocabulary")["rows"]
    rows = [row for row in rows if "," not in row[3] and "words" not in row[2]]
    models = list(dict.fromkeys(row[0] for row in rows))
    for axes, model in zip(figure.subplots(1, len(models), squeeze=False)[0], models, strict=True):
        curves: dict[str, list[tuple[float, float]]] = {}
        for row in rows:
            for text in row[4].split("; ") if row[0] == model else ():
                name, percent = re.match(r"(.+) [\d.]+ \(([-+]?[\d.]+) %\)", text).groups()
                lost = float(percent) if "bits" in name else 100 - float(percent)
                name = name.replace(" bits per byte", "")
                own = ", chosen by both" if row[2] == "news and STS-B" else ""
                curves.setdefault(name + own, []).append((number(row[3]), lost))
        for (name, points), colour in zip(curves.items(), COLOURS.values(), strict=False):
            axes.plot(*zip(*points, strict=True), "o-", color=colour, label=name)
        axes.set(title=model, xlabel="million parameters")
        axes.set_ylim(top=1.5 * axes.get_ylim()[1])  # room for the legend
        axes.legend(loc="upper left", fontsize="small")
        axes.invert_xaxis()
    figure.axes[0].set_ylabel("% lost, of score or bits per byte")


# Each picture: what it is drawn from, and its inches.
PICTURES: dict[Callable, tuple[tuple[str, ...], tuple[float, float]]] = {
    overview: (("peers",), (7.5, 4)),
    peers: (("peers",), (7.5, 4)),
    default: (("smollm2", "gemma"), (8, 3.6)),
    encoders: (("encoders",), (8, 3.4)),
    calibration: (("calibration",), (8, 2.8)),
    steps: (("steps",), (7.5, 2.8)),
    gram: (("gram",), (7.5, 4.6)),
    healing: (("healing",), (8, 3.4)),
    vocabulary: (("vocabulary",), (9, 3.2)),
}


def main() -> None:
    """Draw all pictures and write all tables."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    from liar_ext.report.pictures import SETTINGS

    PLOTS.mkdir(exist_ok=True)
    with matplotlib.rc_context({**SETTINGS, "svg.hashsalt": "liar_ext"}):
        for draw, (names, size) in PICTURES.items():
            figure = pyplot.figure(figsize=size, layout="constrained")
            draw(figure)
            kept = {"Description": digest(names), "Date": None}
            figure.savefig(PLOTS / f"{draw.__name__}.svg", metadata=kept)
            pyplot.close(figure)
    for path in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")):
        text = path.read_text(encoding="utf-8")
        if placed(text) != text:
            path.write_text(placed(text), encoding="utf-8")


if __name__ == "__main__":
    main()
