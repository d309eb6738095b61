"""Draw the picture of README from the tables of docs/quality.md: ``python bench/figures.py``."""

from __future__ import annotations

import re
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

DOCS = Path(__file__).resolve().parents[1] / "docs"
# Rows of the tables, and what the picture calls them.
LANGUAGE = {
    "FLAP": ("FLAP", "#e08214"),
    "SliceGPT, sliced to the same parameters of the blocks": ("SliceGPT", "#b0b0b0"),
    "GRAIL with FLAP's units": ("GRAIL, FLAP's units", "#2166ac"),
    "GRAIL with SlimGPT's units, MLP only": ("GRAIL, SlimGPT's units", "#8073ac"),
    "`liar`, the default: beside text of its own": ("liar_ext", "#1b7837"),
}
TEXTS = ("WikiText-2, calibrated on", "web pages, not calibrated on")
ENCODER = {
    "`wifv`, `uniform`, `none`": ("no reconstruction", "#b0b0b0"),
    "`wifv`, `uniform`, `bias`": ("bias compensation", "#e08214"),
    "`wifv`, `uniform`, `linear`": ("least squares", "#8073ac"),
    "`wifv`, `curve`, `affine`: the default then": ("liar_ext, single channels", "#1b7837"),
}
REMOVED = (20, 30, 50)
MOST = 400  # perplexities above are off the picture


def cells(text: str, name: str) -> list[str]:
    """Return the cells of the first row of that name."""
    return re.search(rf"^\| {re.escape(name)} \|(.*)\|$", text, re.M).group(1).split("|")


def draw_language(axes, text: str, place: int) -> None:
    """Draw perplexity of one of both texts against the fraction of parameters removed."""
    _, own = text.split("## Measured with the peers' own code")
    dense = float(re.findall(r"\(dense ([\d.]+)\)", own)[place])
    for row, (label, colour) in LANGUAGE.items():
        pairs = [re.findall(r"[\d.]+", cell) for cell in cells(text, row)]
        points = {x: float(pair[place]) for x, pair in zip(REMOVED, pairs, strict=True) if pair}
        points = {0: dense, **points}
        width = 3 if label == "liar_ext" else 1.8
        axes.plot(*zip(*points.items(), strict=True), "o-", color=colour, label=label, lw=width)
    axes.set(yscale="log", ylim=(dense * 0.93, MOST), xticks=[0, *REMOVED])
    axes.set_yticks([tick for tick in (20, 30, 50, 100, 200, 400) if tick > dense])
    axes.yaxis.set_major_formatter("{x:.0f}")
    axes.minorticks_off()
    axes.set(xlabel="% of attention and MLP parameters removed", ylabel="perplexity")
    axes.set_title(f"SmolLM2-135M, {TEXTS[place]}", fontsize=11)


def draw_encoder(axes, text: str) -> None:
    """Draw what an encoder keeps of the dense correlation at half of the parameters."""
    labels, values, colours = [], [], []
    for name, (label, colour) in ENCODER.items():
        kept = re.search(r"\(([\d.]+) %\)", cells(text, name)[0]).group(1)
        labels, values, colours = [*labels, label], [*values, float(kept)], [*colours, colour]
    axes.axvline(100, color="#404040", linewidth=1, linestyle=":")
    axes.hlines(labels[::-1], 90, 101, color="#e5e5e5", linewidth=1, zorder=0)
    axes.scatter(values[::-1], labels[::-1], color=colours[::-1], s=90)
    for label, value in zip(labels, values, strict=True):
        axes.annotate(f"{value:.1f} %", (value, label), (0, 9), textcoords="offset points")
    axes.set(xlim=(92, 100.5), ylim=(-0.5, len(labels) - 0.3))
    axes.set(xlabel="% of the dense model's Spearman correlation")
    axes.set_title("all-MiniLM-L6-v2 at half, STS-B test", fontsize=11)


def main() -> None:
    """Write docs/overview.png."""
    text = (DOCS / "quality.md").read_text(encoding="utf-8")
    figure, every = pyplot.subplots(1, 3, figsize=(15, 4))
    draw_encoder(every[0], text)
    draw_language(every[1], text, 0)
    draw_language(every[2], text, 1)
    every[1].legend(frameon=False, fontsize=9, loc="upper left")
    for axes in every:
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(DOCS / "overview.png", dpi=120)


if __name__ == "__main__":
    main()
