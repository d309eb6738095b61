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
    "wanda+uniform+none": ("after Wanda-sp: no reconstruction", "#b0b0b0"),
    "wifv+global+bias": ("FLAP: bias compensation", "#e08214"),
    "obs+uniform+linear": ("after SlimGPT: least squares", "#8073ac"),
    "wifv+global+linear": ("after GRAIL: FLAP's units, least squares", "#2166ac"),
    "liar": ("liar_ext, single channels", "#1b7837"),
    "wifv+curve+auto+layerwise": ("liar_ext, layerwise", "#7fbf7b"),
}
ENCODER = {
    "`wifv`, `uniform`, `none`": ("no reconstruction", "#b0b0b0"),
    "`wifv`, `uniform`, `bias`": ("bias compensation", "#e08214"),
    "`wifv`, `uniform`, `linear`": ("least squares", "#8073ac"),
    "`wifv`, `curve`, `affine`: the default then": ("liar_ext, single channels", "#1b7837"),
}
MOST = 400  # perplexities above are off the picture


def cells(text: str, name: str) -> list[str]:
    """Return the cells of the first row of that name."""
    return re.search(rf"^\| {re.escape(name)} \|(.*)\|$", text, re.M).group(1).split("|")


def number(cell: str) -> float:
    """Return the first number of a cell."""
    return float(re.search(r"[\d.]+", cell).group(0))


def draw_language(axes, text: str) -> None:
    """Draw perplexity against the fraction of parameters removed."""
    dense = float(re.search(r"dense ([\d.]+)\. Calibrated", text).group(1))
    removed = [0, 20, 30, 50]
    for name, (label, colour) in LANGUAGE.items():
        values = [dense, *map(number, cells(text, name))]
        width = 3 if name == "liar" else 1.8
        axes.plot(removed, values, "o-", color=colour, label=label, linewidth=width, markersize=5)
    axes.set(yscale="log", ylim=(dense * 0.93, MOST), xticks=removed)
    axes.set_yticks([30, 50, 100, 200, 400], labels=["30", "50", "100", "200", "400"])
    axes.minorticks_off()
    axes.set(
        xlabel="% of attention and MLP parameters removed", ylabel="perplexity, lower is better"
    )
    axes.set_title("SmolLM2-135M, WikiText-2 test", fontsize=11)
    axes.legend(frameon=False, fontsize=9)


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
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4))
    draw_encoder(left, text)
    draw_language(right, text)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(DOCS / "overview.png", dpi=120)


if __name__ == "__main__":
    main()
