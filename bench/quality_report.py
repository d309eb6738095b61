"""Table and plot of the rows that quality.py measures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

OTHERS = (
    "wanda+uniform+none",
    "wifv+global+bias",
    "wanda+uniform+linear",
    "wifv+global+linear",
    "obs+uniform+linear",
    "obs+uniform+linear+layerwise",
)
# Each beside the others of its schedule; layerwise, which takes longer, beside all of them.
OURS = ("liar", "wifv+curve+auto+layerwise")
TOP = 40.0  # of the plot, times the dense perplexity; what lies above tells nothing


def mean(rows: Sequence[dict], **where: object) -> tuple[float, float]:
    """Return the geometric mean of the perplexities, and the mean divergence, of matching rows."""
    found = [row for row in rows if all(row[key] == value for key, value in where.items())]
    if not found:
        return math.nan, math.nan
    log = sum(math.log(row["perplexity"]) for row in found) / len(found)
    return math.exp(log), sum(row["kl"] for row in found) / len(found)


def layerwise(method: str) -> bool:
    """Tell whether a method, by its name, is layerwise."""
    return method.endswith("+layerwise")


def markdown(rows: list[dict]) -> str:
    """Return one table per text: methods down, fractions removed across, means over seeds."""
    first = rows[0]
    seeds = ", ".join(dict.fromkeys(str(row["seed"]) for row in rows))
    lines = []
    for text in dict.fromkeys(row["text"] for row in rows):
        chosen = [row for row in rows if row["text"] == text]
        ratios = list(dict.fromkeys(row["ratio"] for row in chosen))
        methods = list(dict.fromkeys(row["method"] for row in chosen))
        dense = chosen[0]["dense"]
        lines += [
            f"{first['model']} on {text}: perplexity (KL to the dense model in nats per token), "
            f"{chosen[0]['tokens']:,} tokens in windows of {first['seq_len']}, dense {dense:.2f}. "
            f"Calibrated on {first['calibration_tokens']:,} tokens of "
            f"{', '.join(first['calibration'])}; geometric mean over the seeds {seeds}. "
            f"Columns: fraction removed of the parameters of {first['sites']} sites.",
            "",
            "| method | " + " | ".join(f"{ratio:g}" for ratio in ratios) + " |",
            "|---|" + "---|" * len(ratios),
        ]
        table = {
            method: [mean(chosen, method=method, ratio=ratio) for ratio in ratios]
            for method in methods
        }
        for method, cells in table.items():
            shown = (f"{value:.2f} ({kl:.3f})" if not math.isnan(kl) else "" for value, kl in cells)
            lines.append(f"| {method} | " + " | ".join(shown) + " |")
        others = [method for method in methods if method in OTHERS]
        for ours in (method for method in OURS if method in methods and others):
            shares = []
            for column, (value, _) in enumerate(table[ours]):
                rivals = [m for m in others if layerwise(ours) or not layerwise(m)]
                found = [table[method][column][0] for method in rivals]
                best = min((other for other in found if not math.isnan(other)), default=math.nan)
                share = math.log(value / dense) / math.log(best / dense)
                shares.append("" if math.isnan(share) else f"{share:.2f}")
            lines.append(f"| gap of {ours} / best gap of others | " + " | ".join(shares) + " |")
        lines.append("")
    return "\n".join(lines)


def plot(rows: list[dict], path: Path) -> None:
    """Draw perplexity on the first text against the fraction kept, a line per method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in rows if row["text"] == rows[0]["text"]]
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for method in dict.fromkeys(row["method"] for row in rows):
        ratios = list(dict.fromkeys(row["ratio"] for row in rows if row["method"] == method))
        means = [mean(rows, method=method, ratio=ratio)[0] for ratio in ratios]
        kept = [1.0, *(1 - ratio for ratio in ratios)]
        strong = {"linewidth": 2.5, "color": "black"} if method == "liar" else {"linewidth": 1.2}
        strong["linestyle"] = "--" if layerwise(method) else "-"
        axes.plot(kept, [rows[0]["dense"], *means], marker="o", label=method, **strong)
    axes.set(xlabel="fraction of prunable parameters kept", ylabel="perplexity", yscale="log")
    axes.set_ylim(top=TOP * rows[0]["dense"])
    axes.set_title(f"{rows[0]['model']} on {rows[0]['text']}")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=140)
