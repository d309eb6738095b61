"""Figures that were measured with the code which others publish, to be quoted beside ours."""

from __future__ import annotations

import math
from collections.abc import Mapping

from bench.common import table

MODEL = "SmolLM2-135M-Instruct"
CALIBRATION = "64 × 512 tokens of WikiText-2 validation text, one seed"
# By fraction removed of attention and MLP, and text: perplexity.
DENSE = {"wikitext-2": 26.97, "web": 18.71}
MEASURED: dict[str, dict[float, Mapping[str, float]]] = {
    "FLAP": {
        0.2: {"wikitext-2": 43.60, "web": 32.29},
        0.3: {"wikitext-2": 86.29, "web": 78.70},
        0.5: {"wikitext-2": 749.0, "web": 978.0},
    },
    "GRAIL with FLAP's units": {0.2: {"wikitext-2": 43.13, "web": 35.29}},
    "GRAIL with SlimGPT's units, MLP only": {
        0.2: {"wikitext-2": 38.82, "web": 38.70},
        0.3: {"wikitext-2": 47.32, "web": 50.43},
    },
    "SliceGPT, sliced to the same parameters of the blocks": {
        0.2: {"wikitext-2": 95.3, "web": 146.3}
    },
}
CLOSE = 0.005  # relative: of the dense perplexity, which tells whether a text is the same


def best(model: str, text: str, ratio: float, dense: float) -> tuple[str, float] | None:
    """Return the peer of least perplexity on a text, and its gap ``log(perplexity / dense)``.

    None where there is no figure of that model, text and fraction, or the dense model says that
    the text is another.
    """
    if model != MODEL or not math.isclose(dense, DENSE.get(text, 0.0), rel_tol=CLOSE):
        return None
    found = {
        name: figures[ratio][text]
        for name, figures in MEASURED.items()
        if text in figures.get(ratio, {})
    }
    if not found:
        return None
    name = min(found, key=found.__getitem__)
    return name, math.log(found[name] / DENSE[text])


def markdown() -> list[str]:
    """Return the table of these figures."""
    ratios = sorted({ratio for figures in MEASURED.values() for ratio in figures})
    said = (
        f"Measured with the peers' own code: {MODEL}, {CALIBRATION}; perplexity on WikiText-2 test "
        f"text (dense {DENSE['wikitext-2']}) and web pages (dense {DENSE['web']})."
    )
    rows = []
    for name, figures in MEASURED.items():
        cells = (", ".join(f"{v:g}" for v in figures.get(ratio, {}).values()) for ratio in ratios)
        rows.append([name, *(cell or "–" for cell in cells)])
    return [said, "", table(["method", *(f"{ratio:g}" for ratio in ratios)], rows)]
