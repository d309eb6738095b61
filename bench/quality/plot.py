"""Picture of the rows: the summary against the fraction that is kept, by model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.quality.methods import DENSE, is_layerwise
from bench.quality.report import matching, mean, methods_of, ratios_of

TOP = 3.5  # of the picture: a perplexity 33 times that of the dense model; more tells nothing


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw a line per method, a panel per model."""
    rows = [row for row in rows if row["method"] != DENSE]
    models = list(dict.fromkeys(row["model"] for row in rows))
    if not models:
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(
        1, len(models), figsize=(6.5 * len(models), 4.5), layout="constrained", squeeze=False
    )
    for model, axes in zip(models, panels[0], strict=True):
        some = [row for row in rows if row["model"] == model]
        for method in methods_of(some):
            ratios = [ratio for ratio in ratios_of(some) if matching(some, method, ratio)]
            values = [
                mean(row["summary"] for row in matching(some, method, ratio)) for ratio in ratios
            ]
            axes.plot(
                [1.0, *(1 - ratio for ratio in ratios)],
                [0.0, *values],
                marker="o",
                label=method,
                color="black" if method.startswith("liar") else None,
                linestyle="--" if is_layerwise(method) else "-",
            )
        axes.set(xlabel="fraction of prunable parameters kept", title=model, ylim=(-0.05, None))
        axes.set_ylim(top=min(TOP, axes.get_ylim()[1]))
        axes.set_ylabel("mean over texts of log(perplexity / dense)")
        axes.legend(fontsize="small")
    unfinished = path.with_name(f".{path.name}")
    figure.savefig(unfinished, dpi=140, format="png")
    pyplot.close(figure)
    unfinished.replace(path)
